//! The tensors that a caller brings to dispatch and combine, allocated at full capacity and ready for work requests.

use std::sync::Arc;

use crate::buffer::{OwnedPd, Registration, bytes};
use crate::error::{ConfigError, Error, Limit, Stale};
use crate::gpu::{DeviceMemory, Gpu};
use crate::layout::{PAGE, Plan};

/// Bytes of the word that holds a step's token count.
const NUM_TOKENS_LEN: u64 = 4;

/// One rank's tensors. All are row-major; T = max tokens, K = the call's top-k, H = hidden, L = local experts,
/// P = ranks x T packed rows per local expert, S = ceil(H / 128) scales per row.
///
/// A caller may put memory of its own in place of any of them, allocated by the same GPU and no shorter; every call
/// checks the lengths, and that expert outputs are registered with its session.
pub struct Tensors {
    /// In: `[T, H]` bf16 tokens.
    pub x: DeviceMemory,
    /// In: `[T, K]` int32 or int64 experts, -1 = masked.
    pub topk_idx: DeviceMemory,
    /// In: `[T, K]` f32 weights.
    pub topk_weights: DeviceMemory,
    /// In: one u32, the tokens of this step; 0 is valid. A captured graph reads it at every replay.
    pub num_tokens: DeviceMemory,
    /// Out: `[L, P, H]` bf16 or e4m3 packed rows.
    pub packed_x: DeviceMemory,
    /// Out: `[L, P, S]` f32 scales (one byte each for UE8M0); absent for bf16.
    pub packed_scales: Option<DeviceMemory>,
    /// Out: `[L, P]` `SourceInfo` of 16 bytes.
    pub source_info: DeviceMemory,
    /// Out: `[L]` int32, packed rows reserved per local expert.
    pub expert_counts: DeviceMemory,
    /// Out: `[L, ranks]` `LayoutRange` of two u32.
    pub layout_ranges: DeviceMemory,
    /// Out: `[ranks]` u32, 1 = all of that source's tokens stand in the packed rows.
    pub source_ok: DeviceMemory,
    /// In: `[L, P, H]` bf16 expert outputs, registered.
    pub expert_out: Registration,
    /// Out: `[T, H]` bf16.
    pub out: DeviceMemory,
    /// Out: `[T]` u32, bit k = "pick k of token t was not summed".
    pub lost_topk: DeviceMemory,
    /// In: `[L]` u32, the global expert of each local one; what the stand-in expert multiplies by.
    pub expert_ids: DeviceMemory,
    /// The session that these were made for.
    session: u64,
    plan: Plan,
}

impl Tensors {
    pub(crate) fn new(gpu: &dyn Gpu, pd: &Arc<OwnedPd>, plan: &Plan, session: u64) -> Result<Self, Error> {
        let t = plan.tensors();
        let alloc = |len: u64| gpu.alloc(bytes(len), bytes(PAGE));
        Ok(Self {
            x: alloc(t.x)?,
            topk_idx: alloc(t.topk_idx)?,
            topk_weights: alloc(t.topk_weights)?,
            num_tokens: alloc(NUM_TOKENS_LEN)?,
            packed_x: alloc(t.packed_x)?,
            packed_scales: if t.packed_scales == 0 { None } else { Some(alloc(t.packed_scales)?) },
            source_info: alloc(t.source_info)?,
            expert_counts: alloc(t.expert_counts)?,
            layout_ranges: alloc(t.layout_ranges)?,
            source_ok: alloc(t.source_ok)?,
            expert_out: Registration::new(gpu, pd, t.expert_out)?,
            out: alloc(t.out)?,
            lost_topk: alloc(t.lost_topk)?,
            expert_ids: alloc(t.expert_ids)?,
            session,
            plan: *plan,
        })
    }

    /// Refuses tensors of another session, and any that is shorter than the plan says: kernels trust both.
    pub(crate) fn check(&self, session: u64, pd: &Arc<OwnedPd>) -> Result<(), Error> {
        if self.session != session {
            return Err(Error::Stale(Stale { what: "tensors", found: self.session, current: session }));
        }
        if !self.expert_out.is_of(pd) {
            let what = "expert_out (registered with another session)";
            return Err(Error::Stale(Stale { what, found: 0, current: session }));
        }
        let t = self.plan.tensors();
        let scales = self.packed_scales.as_ref().map_or(0, DeviceMemory::len);
        for (field, len, min) in [
            ("x.len()", self.x.len(), t.x),
            ("topk_idx.len()", self.topk_idx.len(), t.topk_idx),
            ("topk_weights.len()", self.topk_weights.len(), t.topk_weights),
            ("num_tokens.len()", self.num_tokens.len(), NUM_TOKENS_LEN),
            ("packed_x.len()", self.packed_x.len(), t.packed_x),
            ("packed_scales.len()", scales, t.packed_scales),
            ("source_info.len()", self.source_info.len(), t.source_info),
            ("expert_counts.len()", self.expert_counts.len(), t.expert_counts),
            ("layout_ranges.len()", self.layout_ranges.len(), t.layout_ranges),
            ("source_ok.len()", self.source_ok.len(), t.source_ok),
            ("expert_out.len()", self.expert_out.memory().len(), t.expert_out),
            ("out.len()", self.out.len(), t.out),
            ("lost_topk.len()", self.lost_topk.len(), t.lost_topk),
            ("expert_ids.len()", self.expert_ids.len(), t.expert_ids),
        ] {
            if (len as u64) < min {
                let limit = Limit::AtLeastField { field: "bytes of the plan", min };
                return Err(Error::Config(ConfigError { field, value: (len as u64).into(), limit }));
            }
        }
        Ok(())
    }

    /// Sets the tokens of the next step.
    ///
    /// # Errors
    /// `Config` if `num_tokens` exceeds the capacity; `Gpu` if the copy fails.
    pub fn set_num_tokens(&self, gpu: &dyn Gpu, num_tokens: u32) -> Result<(), Error> {
        self.check_num_tokens(num_tokens)?;
        Ok(gpu.write(self.num_tokens.addr(), &num_tokens.to_le_bytes())?)
    }

    pub(crate) fn check_num_tokens(&self, num_tokens: u32) -> Result<(), Error> {
        if num_tokens > self.plan.shape.max_tokens {
            return Err(Error::Config(ConfigError {
                field: "num_tokens",
                value: num_tokens.into(),
                limit: Limit::AtMostField { field: "max_tokens", max: self.plan.shape.max_tokens.into() },
            }));
        }
        Ok(())
    }
}
