//! The tensors that a caller brings to dispatch and combine, allocated at full capacity and ready for work requests.

use std::sync::Arc;

use crate::buffer::{OwnedPd, Registration, bytes};
use crate::error::{ConfigError, Error, Limit};
use crate::gpu::{DeviceMemory, Gpu};
use crate::layout::{PAGE, Plan};

/// One rank's tensors. All are row-major; T = max tokens, K = the call's top-k, H = hidden, L = local experts,
/// P = ranks x T packed rows per local expert, S = ceil(H / 128) scales per row.
///
/// A caller may pass tensors of its own instead, as long as expert outputs that leave zero-copy are registered.
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
    pub(crate) max_tokens: u32,
}

impl Tensors {
    pub(crate) fn new(gpu: &dyn Gpu, pd: &Arc<OwnedPd>, plan: &Plan) -> Result<Self, Error> {
        let t = plan.tensors();
        let alloc = |len: u64| gpu.alloc(bytes(len), bytes(PAGE));
        Ok(Self {
            x: alloc(t.x)?,
            topk_idx: alloc(t.topk_idx)?,
            topk_weights: alloc(t.topk_weights)?,
            num_tokens: alloc(4)?,
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
            max_tokens: plan.shape.max_tokens,
        })
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
        if num_tokens > self.max_tokens {
            return Err(Error::Config(ConfigError {
                field: "num_tokens",
                value: num_tokens.into(),
                limit: Limit::AtMostField { field: "max_tokens", max: self.max_tokens.into() },
            }));
        }
        Ok(())
    }
}
