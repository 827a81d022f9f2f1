//! Dispatch and combine as a caller launches them: checks first, then one kernel launch.
//!
//! A call is refused as a whole, before anything is posted. What a launch needs to stay valid (handles, tensors) is
//! the caller's to keep until the stream has passed it.

use std::sync::Arc;

use ibex_abi::device_ctx::{CombineArgs, DispatchArgs, ExpertArgs, LaneArgs, code};
use parking_lot::Mutex;
use zerocopy::IntoBytes;

use super::gate::StepHold;
use super::order::Mark;
use super::tensors::Tensors;
use super::{COMBINE, DISPATCH, LaneRuntime, Session};
use crate::config::{CombineMode, WireDtype};
use crate::error::{ConfigError, Error, Exhausted, Limit, Resource, Stale};
use crate::gpu::{KernelId, Launch, Stream};
use crate::ids::Lane;

/// Which halves a call launches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Halves {
    /// One launch does both.
    Both,
    /// Only the send half; the receive half is launched later and nothing holds the GPU in between.
    Send,
}

impl Halves {
    fn bits(self) -> u32 {
        match self {
            Self::Both => code::SEND_HALF | code::RECEIVE_HALF,
            Self::Send => code::SEND_HALF,
        }
    }
}

/// Integer type of the top-k ids.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TopkDtype {
    /// 32-bit, signed.
    I32,
    /// 64-bit, signed.
    I64,
}

/// What one dispatch is asked for.
#[derive(Clone, Copy, Debug)]
pub struct DispatchCall {
    /// Picks per token, 1 to the configured maximum.
    pub num_topk: u32,
    /// Integer type of the ids.
    pub topk_dtype: TopkDtype,
    /// Whether `topk_weights` travel with the picks; `reduced` combine needs them.
    pub with_weights: bool,
    /// Which halves to launch.
    pub halves: Halves,
}

/// How expert outputs leave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CombineSource {
    /// Work requests name the registered expert output itself.
    ZeroCopy,
    /// Rows pass through the queue pair's staging ring.
    Staged,
}

/// Indices of one lane's handles or tickets that are free.
pub(super) struct IndexPool {
    free: Mutex<Vec<(usize, Option<Mark>)>>,
    len: usize,
}

impl IndexPool {
    pub(super) fn new(len: u32) -> Arc<Self> {
        let len = len as usize;
        Arc::new(Self { free: Mutex::new((0..len).rev().map(|i| (i, None)).collect()), len })
    }

    fn take(self: &Arc<Self>) -> Result<Index, Error> {
        let (index, reusable_after) = self.free.lock().pop().ok_or(Exhausted {
            resource: Resource::Handles,
            limit: self.len as u64,
            in_use: self.len as u64,
            requested: 1,
        })?;
        Ok(Index { pool: Arc::clone(self), index, last_use: Mutex::new(reusable_after) })
    }
}

/// One index, given back on drop together with the mark of its last use.
struct Index {
    pool: Arc<IndexPool>,
    index: usize,
    last_use: Mutex<Option<Mark>>,
}

impl Drop for Index {
    fn drop(&mut self) {
        self.pool.free.lock().push((self.index, self.last_use.lock().take()));
    }
}

/// One dispatch: what its receive half and its combines need to know. Dropping it frees the handle for a later
/// dispatch, which then follows everything launched with this one.
pub struct DispatchHandle {
    session: u64,
    lane: Lane,
    /// The nonce of its launch: what tells it from every other handle that may be held at the same time.
    launch: u32,
    index: Index,
    ordinal: u64,
    sent: Mark,
    call: DispatchCall,
    received: Mutex<bool>,
    /// The step that this is part of; none in a capture, which launches nothing.
    _step: Option<StepHold>,
}

/// One combine: what its receive half needs to know.
pub struct CombineTicket {
    session: u64,
    lane: Lane,
    /// `launch` of the dispatch that this answers.
    answers: u32,
    index: Index,
    ordinal: u64,
    sent: Mark,
    args: CombineArgs,
    received: Mutex<bool>,
}

impl Session {
    fn check_session(&self, what: &'static str, found: u64) -> Result<(), Error> {
        if found == self.id {
            return Ok(());
        }
        Err(Error::Stale(Stale { what, found, current: self.id }))
    }

    pub(super) fn check_tensors(&self, t: &Tensors) -> Result<(), Error> {
        t.check(self.id, &self.pd)
    }

    pub(crate) fn lane(&self, lane: Lane) -> Result<&LaneRuntime, Error> {
        self.lanes.get(lane.index()).ok_or_else(|| {
            Error::Config(ConfigError {
                field: "lane",
                value: lane.0.into(),
                limit: Limit::Range { min: 0, max: self.lanes.len() as u64 - 1 },
            })
        })
    }

    pub(super) fn check_topk(&self, num_topk: u32) -> Result<(), Error> {
        let max = self.config.max_topk;
        if (1..=max).contains(&num_topk) {
            return Ok(());
        }
        let limit = Limit::Range { min: 1, max: max.into() };
        Err(Error::Config(ConfigError { field: "num_topk", value: num_topk.into(), limit }))
    }

    fn check_dispatch(&self, call: &DispatchCall) -> Result<(), Error> {
        self.check_topk(call.num_topk)?;
        if self.config.combine == CombineMode::Reduced && !call.with_weights {
            return Err(Error::Config(ConfigError {
                field: "topk_weights",
                value: "absent".into(),
                limit: Limit::Present { needed_by: "combine = reduced" },
            }));
        }
        Ok(())
    }

    #[expect(
        unsafe_code,
        reason = "arguments carry addresses of memory that this session and the caller own"
    )]
    fn launch<A: IntoBytes + zerocopy::Immutable>(
        &self,
        stream: &Stream,
        kernel: KernelId,
        args: &A,
    ) -> Result<(), Error> {
        let launch = Launch {
            kernel,
            args: args.as_bytes(),
            blocks: self.config.num_sms,
            warps_per_block: self.config.warps_per_block,
        };
        // SAFETY: `A` is the argument struct of `kernel` (each caller in this file names both); addresses in it
        // belong to this session, which waits for its streams before it drops, or to tensors of the same GPU, whose
        // memory outlives queued launches.
        unsafe { self.gpu.launch(stream, &launch)? };
        Ok(())
    }

    fn dispatch_kernel(&self) -> KernelId {
        match self.config.dtype {
            WireDtype::Bf16 => KernelId::DispatchBf16,
            WireDtype::Fp8 => KernelId::DispatchFp8,
        }
    }

    fn combine_kernel(&self) -> KernelId {
        match self.config.combine {
            CombineMode::Exact => KernelId::CombineExact,
            CombineMode::Reduced => KernelId::CombineReduced,
        }
    }

    fn dispatch_args(&self, lane: LaneArgs, t: &Tensors, call: &DispatchCall) -> DispatchArgs {
        let plan = &self.plan;
        DispatchArgs {
            lane,
            x: t.x.addr(),
            topk_idx: t.topk_idx.addr(),
            topk_weights: if call.with_weights { t.topk_weights.addr() } else { 0 },
            num_tokens: t.num_tokens.addr(),
            packed_x: t.packed_x.addr(),
            packed_scales: t.packed_scales.as_ref().map_or(0, |m| m.addr()),
            source_info: t.source_info.addr(),
            expert_counts: t.expert_counts.addr(),
            layout_ranges: t.layout_ranges.addr(),
            source_ok: t.source_ok.addr(),
            scale_expert_stride: plan.packed_capacity() * plan.scale_row_bytes(),
            scale_row_stride: plan.scale_row_bytes(),
            scale_block_stride: plan.scale_block_bytes(),
            num_topk: call.num_topk,
            topk_is_i64: u32::from(call.topk_dtype == TopkDtype::I64),
            nonce: self.nonce(),
            ..DispatchArgs::default()
        }
    }

    /// Sends this step's tokens to the ranks that own their experts and, with [`Halves::Both`], receives.
    ///
    /// # Ordering
    /// Follows the lane's earlier send halves and the receive half of the step N before, on whatever streams those
    /// were launched.
    ///
    /// # Errors
    /// `Config` for a bad lane, top-k, missing weights or a short tensor; `Stale` for tensors of another session;
    /// `Exhausted` while the receive half of the step N before has not been launched, or all handles are held; `Gated`
    /// if this would begin a step that waits for a switch. Nothing is launched then.
    pub fn dispatch(
        &self,
        lane: Lane,
        stream: &Stream,
        t: &Tensors,
        call: &DispatchCall,
    ) -> Result<DispatchHandle, Error> {
        let runtime = self.lane(lane)?;
        self.check_tensors(t)?;
        self.check_dispatch(call)?;
        if self.gpu.is_capturing(stream)? {
            return self.launch_dispatch(runtime, stream, t, call);
        }
        let step = self.steps.enter()?;
        match self.launch_dispatch(runtime, stream, t, call) {
            Ok(handle) => Ok(DispatchHandle { _step: Some(step), ..handle }),
            Err(error) => {
                step.cancel();
                Err(error)
            }
        }
    }

    fn launch_dispatch(
        &self,
        runtime: &LaneRuntime,
        stream: &Stream,
        t: &Tensors,
        call: &DispatchCall,
    ) -> Result<DispatchHandle, Error> {
        let mut order = self.order(runtime, stream)?;
        order.ring(DISPATCH).next_send()?;
        let index = runtime.handles.take()?;
        if let Some(mark) = index.last_use.lock().as_ref() {
            mark.before(&*self.gpu, stream)?;
        }
        order.before_send(&*self.gpu, DISPATCH, stream)?;
        let buffers = runtime.buffers.read();
        let args = DispatchArgs {
            handle: buffers.handle(index.index),
            halves: call.halves.bits(),
            ..self.dispatch_args(runtime.args(&buffers), t, call)
        };
        self.launch(stream, self.dispatch_kernel(), &args)?;
        let (ordinal, sent) = order.after_send(&*self.gpu, DISPATCH, stream)?;
        let both = call.halves == Halves::Both;
        if both {
            order.after_receive(&*self.gpu, DISPATCH, ordinal, stream)?;
        }
        *index.last_use.lock() = Some(sent.clone());
        Ok(DispatchHandle {
            session: self.id,
            lane: runtime.lane(),
            launch: args.nonce,
            index,
            ordinal,
            sent,
            call: *call,
            received: Mutex::new(both),
            _step: None,
        })
    }

    /// Launches the receive half of a dispatch whose send half was launched alone.
    ///
    /// # Errors
    /// `Stale` for a handle or tensors of another session, or a handle that was received already; `Config` for a short
    /// tensor.
    pub fn dispatch_receive(&self, h: &DispatchHandle, stream: &Stream, t: &Tensors) -> Result<(), Error> {
        self.check_session("dispatch handle", h.session)?;
        self.check_tensors(t)?;
        let runtime = self.lane(h.lane)?;
        let mut received = h.received.lock();
        if *received {
            return Err(Error::Stale(Stale {
                what: "dispatch handle",
                found: h.ordinal,
                current: h.ordinal + 1,
            }));
        }
        let mut order = self.order(runtime, stream)?;
        h.sent.before(&*self.gpu, stream)?;
        let buffers = runtime.buffers.read();
        let args = DispatchArgs {
            handle: buffers.handle(h.index.index),
            halves: code::RECEIVE_HALF,
            ..self.dispatch_args(runtime.args(&buffers), t, &h.call)
        };
        self.launch(stream, self.dispatch_kernel(), &args)?;
        let mark = order.after_receive(&*self.gpu, DISPATCH, h.ordinal, stream)?;
        *h.index.last_use.lock() = Some(mark);
        *received = true;
        Ok(())
    }

    /// Sends expert outputs back to where the dispatch's tokens came from and, with [`Halves::Both`], sums.
    ///
    /// # Errors
    /// `Stale` for a handle or tensors of another session, or a handle whose receive half was not launched; `Config`
    /// and `Exhausted` as [`Session::dispatch`].
    pub fn combine(
        &self,
        h: &DispatchHandle,
        stream: &Stream,
        t: &Tensors,
        source: CombineSource,
        halves: Halves,
    ) -> Result<CombineTicket, Error> {
        self.check_session("dispatch handle", h.session)?;
        self.check_tensors(t)?;
        let runtime = self.lane(h.lane)?;
        if !*h.received.lock() {
            return Err(Error::Stale(Stale {
                what: "dispatch handle (not received yet)",
                found: 0,
                current: 1,
            }));
        }
        let mut order = self.order(runtime, stream)?;
        order.ring(COMBINE).next_send()?;
        let index = runtime.tickets.take()?;
        for mark in [h.index.last_use.lock().as_ref(), index.last_use.lock().as_ref()].into_iter().flatten() {
            mark.before(&*self.gpu, stream)?;
        }
        order.before_send(&*self.gpu, COMBINE, stream)?;
        let buffers = runtime.buffers.read();
        let (ticket, verdicts) = buffers.ticket(index.index);
        let args = CombineArgs {
            lane: runtime.args(&buffers),
            handle: buffers.handle(h.index.index),
            ticket,
            verdicts,
            expert_out: t.expert_out.memory().addr(),
            topk_weights: t.topk_weights.addr(),
            out: t.out.addr(),
            lost_topk: t.lost_topk.addr(),
            expert_out_lkey_be: t.expert_out.lkey_be(),
            zero_copy: u32::from(source == CombineSource::ZeroCopy),
            halves: halves.bits(),
            nonce: self.nonce(),
        };
        self.launch(stream, self.combine_kernel(), &args)?;
        let (ordinal, sent) = order.after_send(&*self.gpu, COMBINE, stream)?;
        let both = halves == Halves::Both;
        if both {
            order.after_receive(&*self.gpu, COMBINE, ordinal, stream)?;
        }
        for used in [&h.index, &index] {
            *used.last_use.lock() = Some(sent.clone());
        }
        Ok(CombineTicket {
            session: self.id,
            lane: h.lane,
            answers: h.launch,
            index,
            ordinal,
            sent,
            args,
            received: Mutex::new(both),
        })
    }

    /// Launches the receive half of a combine whose send half was launched alone. `h` is its dispatch.
    ///
    /// # Errors
    /// `Stale` for a ticket of another session or one that was received already, or a handle that is not the one of
    /// its combine.
    pub fn combine_receive(
        &self,
        h: &DispatchHandle,
        ticket: &CombineTicket,
        stream: &Stream,
    ) -> Result<(), Error> {
        self.check_session("combine ticket", ticket.session)?;
        self.check_session("dispatch handle", h.session)?;
        if ticket.answers != h.launch {
            return Err(Error::Stale(Stale {
                what: "dispatch handle (the ticket answers another dispatch)",
                found: h.launch.into(),
                current: ticket.answers.into(),
            }));
        }
        let runtime = self.lane(ticket.lane)?;
        let mut received = ticket.received.lock();
        if *received {
            return Err(Error::Stale(Stale {
                what: "combine ticket",
                found: ticket.ordinal,
                current: ticket.ordinal + 1,
            }));
        }
        let mut order = self.order(runtime, stream)?;
        ticket.sent.before(&*self.gpu, stream)?;
        let args = CombineArgs { halves: code::RECEIVE_HALF, nonce: self.nonce(), ..ticket.args };
        self.launch(stream, self.combine_kernel(), &args)?;
        let mark = order.after_receive(&*self.gpu, COMBINE, ticket.ordinal, stream)?;
        for used in [&h.index, &ticket.index] {
            *used.last_use.lock() = Some(mark.clone());
        }
        *received = true;
        Ok(())
    }

    /// Runs the stand-in expert on the packed rows: y = bf16(x * (1 + 0.1 * expert)).
    ///
    /// # Errors
    /// `Stale` for tensors of another session, `Config` for a short one; `Gpu` if the launch is refused.
    pub fn run_expert(&self, stream: &Stream, t: &Tensors) -> Result<(), Error> {
        self.check_tensors(t)?;
        let plan = &self.plan;
        let s = &plan.shape;
        let args = ExpertArgs {
            packed_x: t.packed_x.addr(),
            packed_scales: t.packed_scales.as_ref().map_or(0, |m| m.addr()),
            layout_ranges: t.layout_ranges.addr(),
            expert_ids: t.expert_ids.addr(),
            expert_out: t.expert_out.memory().addr(),
            scale_expert_stride: plan.packed_capacity() * plan.scale_row_bytes(),
            scale_row_stride: plan.scale_row_bytes(),
            scale_block_stride: plan.scale_block_bytes(),
            num_ranks: s.num_ranks,
            max_tokens: s.max_tokens,
            hidden: s.hidden,
            max_local_experts: s.max_local_experts,
            wire_dtype: s.wire_dtype,
            scale_kind: s.scale_kind,
        };
        self.launch(stream, KernelId::Expert, &args)
    }
}
