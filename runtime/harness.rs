//! What benches and tests share: a [`World`] with tensors, fed with reference inputs and checked against them.
//!
//! A [`Rig`] owns the world, one set of tensors and one stream per rank. It copies inputs in and outputs out between
//! steps, never while kernels run.

mod baseline;
pub mod detection;
pub mod fuzz;
mod parallel;
pub mod post;
pub mod rejoin;

pub use baseline::{BaselineError, NcclAllToAll};
pub use parallel::on_all_cores;

use std::sync::Arc;

use ibex_abi::device_ctx::{LayoutRange, SourceInfo};
use zerocopy::{FromBytes, FromZeros, IntoBytes};

use crate::config::{Config, ValidConfig};
use crate::error::Error;
use crate::gpu::{DeviceMemory, Gpu, Stream};
use crate::ids::{Lane, LocalExpertIdx, Rank};
use crate::layout::Plan;
use crate::reference::check::{CombineOutput, DispatchOutput, PackedRows, Step, Verdict};
use crate::reference::inputs::RankInput;
use crate::session::{CombineSource, DispatchCall, Halves, Session, Tensors, TopkDtype, World, WorldOptions};

/// One rank of a [`Rig`].
pub struct RigRank {
    /// Its session.
    pub session: Arc<Session>,
    /// Its tensors.
    pub tensors: Tensors,
    /// The stream that its steps run on.
    pub stream: Stream,
}

/// How a rig launches one step.
#[derive(Clone, Copy, Debug)]
pub struct StepPlan {
    /// The lane.
    pub lane: Lane,
    /// Integer type of the top-k ids.
    pub topk_dtype: TopkDtype,
    /// Launch send and receive halves apart.
    pub hooks: bool,
    /// How expert outputs leave.
    pub source: CombineSource,
}

impl Default for StepPlan {
    fn default() -> Self {
        Self { lane: Lane(0), topk_dtype: TopkDtype::I32, hooks: false, source: CombineSource::ZeroCopy }
    }
}

impl StepPlan {
    fn halves(&self) -> Halves {
        if self.hooks { Halves::Send } else { Halves::Both }
    }
}

/// All ranks of a group, ready to run checked steps.
pub struct Rig {
    // Ranks first: their tensors and sessions go before the world's GPUs and devices.
    ranks: Vec<RigRank>,
    config: ValidConfig,
    world: World,
}

impl Rig {
    /// Creates a world and tensors for every rank.
    ///
    /// # Errors
    /// As [`World::new`] and [`Session::tensors`].
    pub fn new(config: &Config, options: &WorldOptions) -> Result<Self, Error> {
        let world = World::new(config, options)?;
        let rank = |session: &Arc<Session>| -> Result<RigRank, Error> {
            Ok(RigRank {
                tensors: session.tensors()?,
                stream: session.stream(),
                session: Arc::clone(session),
            })
        };
        let ranks = world.sessions().iter().map(rank).collect::<Result<Vec<_>, _>>()?;
        Ok(Self { ranks, config: config.validate()?, world })
    }

    /// The world.
    pub fn world(&self) -> &World {
        &self.world
    }

    /// The configuration.
    pub fn config(&self) -> &ValidConfig {
        &self.config
    }

    /// The ranks, in order.
    pub fn ranks(&self) -> &[RigRank] {
        &self.ranks
    }

    /// Copies one step's inputs in.
    ///
    /// # Errors
    /// `Config` for too many tokens; `Gpu` if a copy fails.
    pub fn load(&self, inputs: &[RankInput], plan: &StepPlan) -> Result<(), Error> {
        for (rank, input) in self.ranks.iter().zip(inputs) {
            rank.load(input, plan.topk_dtype)?;
        }
        Ok(())
    }

    /// Launches dispatch, stand-in expert and combine on every rank; nothing waits for them yet.
    ///
    /// # Errors
    /// What a session refused.
    pub fn launch(&self, num_topk: u32, plan: &StepPlan) -> Result<(), Error> {
        for rank in &self.ranks {
            rank.launch(num_topk, plan)?;
        }
        Ok(())
    }

    /// Waits until every rank's stream is empty.
    ///
    /// # Errors
    /// What a GPU reports.
    pub fn synchronize(&self) -> Result<(), Error> {
        for rank in &self.ranks {
            rank.session.gpu().synchronize(&rank.stream)?;
        }
        Ok(())
    }

    /// Checks every rank's outputs of one step that ran without an expected loss.
    ///
    /// # Errors
    /// `Gpu` if a copy fails.
    pub fn check(&self, inputs: &[RankInput]) -> Result<Verdict, Error> {
        let step = Step::new(&self.config, inputs);
        let alive = vec![true; self.ranks.len()];
        let check = |index: usize| -> Result<Verdict, Error> {
            let rank = &self.ranks[index];
            let mut verdict = rank.check_dispatch(&step)?;
            verdict += rank.check_combine(&step, &inputs[index], &alive)?;
            Ok(verdict)
        };
        let mut total = Verdict::default();
        for verdict in on_all_cores(self.ranks.len(), check) {
            total += verdict?;
        }
        Ok(total)
    }

    /// One whole checked step.
    ///
    /// # Errors
    /// As [`Rig::load`], [`Rig::launch`], [`Rig::synchronize`] and [`Rig::check`].
    pub fn step(&self, inputs: &[RankInput], plan: &StepPlan) -> Result<Verdict, Error> {
        self.load(inputs, plan)?;
        let num_topk = inputs.first().map_or(1, |i| i.num_topk);
        self.launch(num_topk, plan)?;
        self.synchronize()?;
        self.check(inputs)
    }
}

impl RigRank {
    fn gpu(&self) -> &Arc<dyn Gpu> {
        self.session.gpu()
    }

    /// This rank's place in the group.
    pub fn rank(&self) -> Rank {
        self.session.rank()
    }

    /// Copies one step's input in.
    ///
    /// # Errors
    /// As [`Rig::load`].
    pub fn load(&self, input: &RankInput, topk_dtype: TopkDtype) -> Result<(), Error> {
        let (gpu, t) = (&**self.gpu(), &self.tensors);
        t.set_num_tokens(gpu, input.num_tokens)?;
        if input.num_tokens == 0 {
            return Ok(());
        }
        gpu.write(t.x.addr(), input.x.as_bytes())?;
        gpu.write(t.topk_weights.addr(), input.topk_weights.as_bytes())?;
        match topk_dtype {
            TopkDtype::I32 => gpu.write(t.topk_idx.addr(), input.topk_idx.as_bytes())?,
            TopkDtype::I64 => {
                let wide: Vec<i64> = input.topk_idx.iter().map(|id| i64::from(*id)).collect();
                gpu.write(t.topk_idx.addr(), wide.as_bytes())?;
            }
        }
        Ok(())
    }

    /// Launches one step of this rank.
    ///
    /// # Errors
    /// What the session refused.
    pub fn launch(&self, num_topk: u32, plan: &StepPlan) -> Result<(), Error> {
        let (session, stream, t) = (&self.session, &self.stream, &self.tensors);
        let call =
            DispatchCall { num_topk, topk_dtype: plan.topk_dtype, with_weights: true, halves: plan.halves() };
        let handle = session.dispatch(plan.lane, stream, t, &call)?;
        if plan.hooks {
            session.dispatch_receive(&handle, stream, t)?;
        }
        session.run_expert(stream, t)?;
        let ticket = session.combine(&handle, stream, t, plan.source, plan.halves())?;
        if plan.hooks {
            session.combine_receive(&handle, &ticket, stream)?;
        }
        Ok(())
    }

    fn read_vec<T: FromBytes + IntoBytes + FromZeros + Clone>(
        &self,
        memory: &DeviceMemory,
        count: usize,
    ) -> Result<Vec<T>, Error> {
        let mut values = vec![T::new_zeroed(); count];
        if count != 0 {
            self.gpu().read(memory.addr(), values.as_mut_bytes())?;
        }
        Ok(values)
    }

    /// Checks what the dispatch left here.
    ///
    /// # Errors
    /// `Gpu` if a copy fails.
    pub fn check_dispatch(&self, step: &Step<'_>) -> Result<Verdict, Error> {
        let (config, t) = (self.session.config(), &self.tensors);
        let experts = config.max_local_experts() as usize;
        let ranks = config.num_ranks as usize;
        let output = DispatchOutput {
            expert_counts: &self.read_vec::<i32>(&t.expert_counts, experts)?,
            layout_ranges: &self.read_vec::<LayoutRange>(&t.layout_ranges, experts * ranks)?,
            source_ok: &self.read_vec::<u32>(&t.source_ok, ranks)?,
            rows: &DeviceRows { rank: self, plan: Plan::new(config, self.rank()) },
        };
        Ok(step.check_dispatch(self.rank(), &output))
    }

    /// What the combine left here: outputs and loss bits.
    ///
    /// # Errors
    /// `Gpu` if a copy fails.
    pub fn combine_output(&self, num_tokens: u32) -> Result<(Vec<u16>, Vec<u32>), Error> {
        let tokens = num_tokens as usize;
        let hidden = self.session.config().hidden as usize;
        Ok((
            self.read_vec::<u16>(&self.tensors.out, tokens * hidden)?,
            self.read_vec::<u32>(&self.tensors.lost_topk, tokens)?,
        ))
    }

    /// Loss bits of the last combine, one word per token.
    ///
    /// # Errors
    /// `Gpu` if a copy fails.
    pub fn lost_topk(&self, num_tokens: u32) -> Result<Vec<u32>, Error> {
        self.read_vec::<u32>(&self.tensors.lost_topk, num_tokens as usize)
    }

    /// Overwrites the outputs that a check reads in full, so that an earlier step's cannot pass for this one's.
    ///
    /// # Errors
    /// `Gpu` if a copy fails.
    pub fn wipe_outputs(&self) -> Result<(), Error> {
        let t = &self.tensors;
        for memory in [&t.out, &t.lost_topk, &t.expert_counts, &t.layout_ranges, &t.source_ok] {
            self.gpu().fill(memory.addr(), 0xa5, memory.len())?;
        }
        Ok(())
    }

    /// Checks what the combine left here; `alive` says whose losses are expected.
    ///
    /// # Errors
    /// `Gpu` if a copy fails.
    pub fn check_combine(
        &self,
        step: &Step<'_>,
        input: &RankInput,
        alive: &[bool],
    ) -> Result<Verdict, Error> {
        let (out, lost_topk) = self.combine_output(input.num_tokens)?;
        let output = CombineOutput { out: &out, lost_topk: &lost_topk };
        Ok(step.check_combine(self.rank(), &output, alive))
    }
}

/// Packed tensors in device memory.
struct DeviceRows<'a> {
    rank: &'a RigRank,
    plan: Plan,
}

impl DeviceRows<'_> {
    fn flat(&self, expert: LocalExpertIdx, row: u32) -> u64 {
        u64::from(expert.0) * self.plan.packed_capacity() + u64::from(row)
    }

    fn read(&self, memory: &DeviceMemory, offset: u64, into: &mut [u8]) {
        // A row index that a device left wrong may point outside; the check then compares with zeroes and fails.
        if self.rank.gpu().read(memory.addr() + offset, into).is_err() {
            into.fill(0);
        }
    }
}

impl PackedRows for DeviceRows<'_> {
    fn payload(&self, expert: LocalExpertIdx, first: u32, into: &mut [u8]) {
        let offset = self.flat(expert, first) * u64::from(self.plan.layout.payload_bytes);
        self.read(&self.rank.tensors.packed_x, offset, into);
    }

    fn scales(&self, expert: LocalExpertIdx, row: u32, into: &mut [u8]) {
        if let Some(scales) = &self.rank.tensors.packed_scales {
            self.read(scales, self.flat(expert, row) * self.plan.scale_row_bytes(), into);
        }
    }

    fn source_info(&self, expert: LocalExpertIdx, row: u32) -> SourceInfo {
        let mut info = SourceInfo::default();
        let offset = self.flat(expert, row) * size_of::<SourceInfo>() as u64;
        self.read(&self.rank.tensors.source_info, offset, info.as_mut_bytes());
        info
    }
}
