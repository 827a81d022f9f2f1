//! Steps driven from the host's own memory: slices in, vectors out, every length checked.
//!
//! For first steps, examples and tests. A serving stack keeps its tensors on the GPU and never comes through here.
//! Nothing is owned: copies go to and from a caller's [`Tensors`] while no kernel uses them.

use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes};

use super::calls::{CombineSource, DispatchCall, Halves, TopkDtype};
use super::{Session, Tensors};
use crate::error::{ConfigError, Error, Limit};
use crate::gpu::{DeviceMemory, Stream};
use crate::ids::Lane;

/// One step's tokens of one rank.
#[derive(Clone, Copy, Debug)]
pub struct Tokens<'a> {
    /// `[num_tokens, hidden]` bf16.
    pub x: &'a [u16],
    /// `[num_tokens, num_topk]` experts, -1 = masked.
    pub topk_idx: &'a [i32],
    /// `[num_tokens, num_topk]`.
    pub topk_weights: &'a [f32],
}

/// What a combine gave back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Combined {
    /// `[num_tokens, hidden]` bf16.
    pub out: Vec<u16>,
    /// `[num_tokens]`: bit k = "the pick was not summed".
    pub lost_topk: Vec<u32>,
}

impl DispatchCall {
    /// Both halves, int32 ids, weights that travel.
    #[must_use]
    pub const fn new(num_topk: u32) -> Self {
        Self { num_topk, topk_dtype: TopkDtype::I32, with_weights: true, halves: Halves::Both }
    }
}

fn expect_len(field: &'static str, found: usize, expected: u64, of: &'static str) -> Result<(), ConfigError> {
    if found as u64 == expected {
        return Ok(());
    }
    Err(ConfigError {
        field,
        value: (found as u64).into(),
        limit: Limit::Exactly { field: of, value: expected },
    })
}

impl Session {
    /// Copies one step's tokens in; their picks are int32.
    ///
    /// # Errors
    /// `Config` for more tokens than fit, or lengths that do not belong together, `Stale` for tensors of another
    /// session, before anything is copied; `Gpu` if a copy fails.
    pub fn load(&self, t: &Tensors, num_topk: u32, tokens: &Tokens<'_>) -> Result<u32, Error> {
        self.check_tensors(t)?;
        self.check_topk(num_topk)?;
        let picks = tokens.topk_idx.len() as u64;
        let num_tokens = picks / u64::from(num_topk);
        expect_len(
            "topk_idx.len()",
            tokens.topk_idx.len(),
            num_tokens * u64::from(num_topk),
            "tokens x num_topk",
        )?;
        expect_len("topk_weights.len()", tokens.topk_weights.len(), picks, "topk_idx.len()")?;
        expect_len("x.len()", tokens.x.len(), num_tokens * u64::from(self.config.hidden), "tokens x hidden")?;
        // A count beyond 32 bits is beyond every capacity.
        let num_tokens = u32::try_from(num_tokens).unwrap_or(u32::MAX);
        t.set_num_tokens(&*self.gpu, num_tokens)?;
        if num_tokens != 0 {
            self.gpu.write(t.x.addr(), tokens.x.as_bytes())?;
            self.gpu.write(t.topk_idx.addr(), tokens.topk_idx.as_bytes())?;
            self.gpu.write(t.topk_weights.addr(), tokens.topk_weights.as_bytes())?;
        }
        Ok(num_tokens)
    }

    /// Launches a whole step on lane 0: dispatch, the stand-in expert, combine. A group's ranks all launch before one
    /// of them is waited for.
    ///
    /// # Errors
    /// As [`Session::dispatch`].
    pub fn launch_step(&self, stream: &Stream, t: &Tensors, num_topk: u32) -> Result<(), Error> {
        let handle = self.dispatch(Lane(0), stream, t, &DispatchCall::new(num_topk))?;
        self.run_expert(stream, t)?;
        self.combine(&handle, stream, t, CombineSource::ZeroCopy, Halves::Both)?;
        Ok(())
    }

    /// Waits for a stream and copies out what its last combine gave back.
    ///
    /// # Errors
    /// `Config` for more tokens than fit; `Stale` for tensors of another session; `Gpu` if a launch or a copy failed.
    pub fn finish(&self, stream: &Stream, t: &Tensors, num_tokens: u32) -> Result<Combined, Error> {
        self.check_tensors(t)?;
        t.check_num_tokens(num_tokens)?;
        self.gpu.synchronize(stream)?;
        let len = num_tokens as usize;
        Ok(Combined {
            out: self.read_vec(&t.out, len * self.config.hidden as usize)?,
            lost_topk: self.read_vec(&t.lost_topk, len)?,
        })
    }

    fn read_vec<T: FromBytes + IntoBytes + Immutable + FromZeros + Clone>(
        &self,
        memory: &DeviceMemory,
        len: usize,
    ) -> Result<Vec<T>, Error> {
        let mut values = vec![T::new_zeroed(); len];
        if len != 0 {
            self.gpu.read(memory.addr(), values.as_mut_bytes())?;
        }
        Ok(values)
    }
}
