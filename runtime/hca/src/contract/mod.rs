//! One suite of expectations for every provider of [`Hca`].
//!
//! A provider shows up with a [`World`]: two connected devices and a way to let them work. Each case in
//! [`CASES`] makes its own objects in a fresh world and panics, with what it saw, where the device does
//! not keep the contract. What only one provider can show (its counters, its trace) is tested beside it.
//!
//! *Who owns what.* A case owns everything it makes; at its end devices hold nothing of it.

use std::sync::Arc;

use ibex_abi::cqe::{CqeOpcode, Syndrome};
use ibex_abi::types::{Iova, Lkey, Pd, Psn, Rkey};
use ibex_abi::wqe::{AtomicOp, CtrlFlags, DataSeg, Remote, Request, SegmentBuf};

use crate::control_region::ControlRegion;
use crate::host_memory::Registered;
use crate::host_qp::{Completion, ConnectSpec, HostQp, HostQpSpec, Outcome, Reset, Rts};
use crate::{Access, Hca};

mod bring_up;
mod errors;
mod events;
mod operations;
mod queues;

/// Two devices that can reach each other.
pub trait World {
    /// One of the two devices.
    fn hca(&self, end: usize) -> Arc<dyn Hca>;

    /// Lets the devices work until nothing more happens, passing time as timers need, at most `nanos`.
    fn settle(&mut self, nanos: u64);

    /// Whether masked atomics reach the other device: RoCEv2 has no packets for them.
    fn has_masked_atomics(&self) -> bool {
        true
    }

    /// Whether failures of queues arrive as events: real kernels may keep them.
    fn tells_of_failures(&self) -> bool {
        true
    }

    /// Whether a port that does not exist is found out when a path to it is asked for; else when nobody answers.
    fn knows_neighbours(&self) -> bool {
        true
    }
}

/// A case of the suite.
pub type Case = fn(&mut dyn World);

/// Declares the list of cases from the functions' names.
macro_rules! cases {
    ($($module:ident :: $case:ident,)*) => {
        /// Every case by name.
        pub const CASES: &[(&str, Case)] = &[$((stringify!($case), $module::$case)),*];
    };
}

cases! {
    bring_up::a_pair_comes_up_and_goes_down_without_trace,
    bring_up::illegal_transitions_are_refused_and_change_nothing,
    bring_up::malformed_commands_are_refused_with_the_right_status,
    bring_up::objects_in_use_are_not_destroyed,
    bring_up::queues_must_lie_inside_their_umem,
    bring_up::unreachable_ports_are_not_resolved,
    operations::a_write_arrives,
    operations::inline_writes_of_every_length_arrive,
    operations::a_gather_list_is_written_in_order,
    operations::a_zero_length_write_completes_without_a_key,
    operations::a_write_with_immediate_consumes_a_receive,
    operations::a_read_brings_memory_back,
    operations::sends_fill_receives_in_order,
    operations::atomics_return_the_old_value,
    operations::masked_atomics_respect_their_masks,
    operations::a_nop_completes,
    operations::only_signalled_requests_complete,
    operations::a_fenced_write_sees_the_read_before_it,
    queues::a_queue_of_four_blocks_wraps_past_2_to_the_16,
    queues::a_long_entry_wraps_at_the_end_of_the_queue,
    queues::a_ring_cq_shows_every_completion_with_its_owner_bit,
    queues::an_overrun_fails_the_queue_and_its_user,
    queues::an_overrun_is_ignored_where_asked,
    queues::a_collapsed_cq_shows_the_latest_completion,
    queues::reset_and_renewal_reuse_the_same_memory,
    errors::a_bad_remote_key_fails_with_its_syndrome_and_flushes,
    errors::each_remote_violation_has_its_syndrome,
    errors::each_local_violation_has_its_syndrome,
    errors::a_malformed_entry_fails_locally,
    errors::a_revoked_key_is_refused,
    errors::moving_to_err_flushes_what_is_posted,
    errors::an_unanswered_request_exhausts_its_retries,
    errors::a_send_without_receive_waits_or_gives_up,
    errors::a_receive_that_is_too_short_fails_both_ends,
    events::an_armed_queue_tells_of_one_completion,
    events::a_request_for_solicited_completions_waits_for_one_or_an_error,
    events::an_event_queue_wraps_and_overflows,
    events::failures_arrive_as_events,
    events::event_queues_are_refused_and_kept_by_rule,
}

/// Runs every case, each in a world of its own.
pub fn run_all(mut world: impl FnMut() -> Box<dyn World>) {
    for (_, case) in CASES {
        case(&mut *world());
    }
}

/// Long enough for every timer that a case uses.
const PATIENCE_NS: u64 = 10_000_000_000;
/// Bytes of each test buffer.
const BUFFER: u64 = 64 << 10;
/// First sequence numbers close to the end of the circle, so that every case wraps.
const PSN: [Psn; 2] = [Psn::new(0xff_fffe), Psn::new(0x12_3456)];

/// One end of a case's connection.
struct End {
    // Fields drop in this order: queue pair, buffer, region.
    qp: Option<HostQp<Rts>>,
    buffer: Registered,
    region: ControlRegion,
    pd: Pd,
    hca: Arc<dyn Hca>,
}

impl Drop for End {
    fn drop(&mut self) {
        self.qp = None;
    }
}

/// What a case connects with.
#[derive(Clone, Copy, Default)]
struct Rig {
    qp: HostQpSpec,
    connect: ConnectSpec,
}

impl End {
    fn new(hca: Arc<dyn Hca>, access: Access) -> Self {
        let pd = hca.alloc_pd().expect("a protection domain");
        let region = ControlRegion::host(&hca, 4 << 20).expect("a control region");
        let buffer = Registered::new(&hca, pd, BUFFER, access).expect("a buffer");
        Self { qp: None, buffer, region, pd, hca }
    }

    fn create(&self, spec: HostQpSpec) -> HostQp<Reset> {
        HostQp::create(&self.region, self.pd, spec).expect("a queue pair")
    }

    fn qp(&mut self) -> &mut HostQp<Rts> {
        self.qp.as_mut().expect("the end is connected")
    }

    fn data(&self, offset: u64, len: u32) -> DataSeg {
        DataSeg::new(len, self.buffer.key().lkey.get(), self.buffer.iova(offset))
    }

    fn remote(&self, offset: u64) -> Remote {
        Remote { addr: Iova(self.buffer.iova(offset)), rkey: self.buffer.key().rkey }
    }

    fn put(&self, offset: u64, bytes: &[u8]) {
        self.buffer.view().write(offset, bytes);
    }

    fn get(&self, offset: u64, len: u64) -> Vec<u8> {
        self.buffer.view().to_vec(offset, len)
    }

    /// The next completion, which must be there.
    fn completion(&mut self) -> Completion {
        self.qp().poll().expect("a send completion")
    }

    /// The next completion, which must be good.
    fn good(&mut self) -> Completion {
        let completion = self.completion();
        assert_eq!(completion.outcome, Outcome::Good(CqeOpcode::Req), "{completion:?}");
        completion
    }

    /// The next completion, which must have this syndrome.
    fn failed(&mut self, syndrome: Syndrome) -> Completion {
        let completion = self.completion();
        assert_eq!(completion.syndrome(), Some(syndrome), "{completion:?}");
        completion
    }
}

/// Two connected ends.
fn connected(world: &dyn World, rig: Rig) -> [End; 2] {
    connected_with(world, [rig, rig], Access::ALL)
}

fn connected_with(world: &dyn World, rigs: [Rig; 2], access: Access) -> [End; 2] {
    let mut ends = [0, 1].map(|end| End::new(world.hca(end), access));
    connect(&mut ends, rigs);
    ends
}

fn connect(ends: &mut [End; 2], rigs: [Rig; 2]) {
    let qps = [0, 1].map(|end| ends[end].create(rigs[end].qp));
    let endpoints = [0, 1].map(|end: usize| qps[end].endpoint(PSN[end]));
    for (end, qp) in qps.into_iter().enumerate() {
        let spec = ConnectSpec { psn: PSN[end], ..rigs[end].connect };
        ends[end].qp = Some(qp.connect(&endpoints[1 - end], &spec).expect("a connection"));
    }
}

fn write(remote: Remote, payload: Vec<SegmentBuf>) -> Request {
    Request::Write { remote, payload }
}

fn inline(bytes: &[u8]) -> Vec<SegmentBuf> {
    vec![SegmentBuf::Inline(bytes.to_vec())]
}

fn gather(segments: &[DataSeg]) -> Vec<SegmentBuf> {
    segments.iter().copied().map(SegmentBuf::Data).collect()
}

fn atomic(remote: Remote, op: AtomicOp, result: DataSeg) -> Request {
    Request::Atomic { remote, op, result }
}

/// A pattern that differs at every offset and for every seed.
fn pattern(seed: u8, len: usize) -> Vec<u8> {
    // CAST: the low byte of a hash is what is wanted.
    (0..len).map(|at| (at.wrapping_mul(0x9e37) >> 3) as u8 ^ seed).collect()
}

const SIGNALED: CtrlFlags = CtrlFlags::SIGNALED;
const BAD_KEY: Rkey = Rkey(0x00ba_d000);
const BAD_LKEY: Lkey = Lkey(0x00ba_d000);
