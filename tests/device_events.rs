//! What a device reports, removal included, reaches the session: typed, counted, and as evidence against the peers
//! concerned; and every call of bring-up may be refused, and nothing is left.
//!
//! The same on the real libmlx5: `tests/mlx5.rs`. How a group agrees on it: `tests/group.rs`.

#![expect(clippy::unwrap_used, reason = "test helpers: a failed expectation is the message")]

use std::sync::Arc;

use ibex::config::{Config, RoutePolicy};
use ibex::error::Error;
use ibex::gpu::pool::{Pool, PoolConfig};
use ibex::gpu::{Gpu, GpuError, HostGpu};
use ibex::harness::{Rig, StepPlan};
use ibex::ids::Rank;
use ibex::recovery::{DeviceEvent, DeviceEventCounts};
use ibex::reference::inputs::RankInput;
use ibex::reference::rng::InputKey;
use ibex::reference::routing::Routing;
use ibex::session::{DeviceWrapper, Replacement, Session, World, WorldOptions};
use ibex_abi::prm::Status;
use ibex_abi::types::{CqNum, QpNum};
use ibex_hca::AsyncEvent;
use ibex_hca::emulated::{EmulatedConfig, EmulatedHca, Fabric, FabricConfig, ObjectCounts};
use ibex_hca::fault::{Effect, Fault, FaultHca};
use parking_lot::Mutex;

/// A shape that takes milliseconds, all of it through queue pairs.
fn config() -> Config {
    Config {
        num_ranks: 3,
        max_tokens: 9,
        hidden: 128,
        num_experts: 9,
        max_topk: 3,
        channels: Some(2),
        // Other tests share the cores.
        detect_ms: 20_000,
        route: RoutePolicy::Ibgda,
        ..Config::default()
    }
}

type Devices = Arc<Mutex<Vec<Arc<FaultHca<EmulatedHca>>>>>;

/// Options whose devices are kept in the list; each begins with `fault`, if it is the rank's.
fn options(fault: Option<(Rank, Fault)>) -> (WorldOptions, Devices) {
    let devices = Devices::default();
    let made = Arc::clone(&devices);
    let wrap = move |rank, device| {
        let faulty = FaultHca::new(device);
        if let Some((_, fault)) = fault.filter(|(of, _)| *of == rank) {
            assert!(faulty.inject(fault));
        }
        made.lock().push(Arc::clone(&faulty));
        faulty as _
    };
    (WorldOptions { devices: DeviceWrapper::new(wrap), ..WorldOptions::default() }, devices)
}

fn rig() -> (Rig, Vec<Arc<FaultHca<EmulatedHca>>>) {
    let (options, devices) = options(None);
    let rig = Rig::new(&config(), &options).unwrap();
    let devices = devices.lock().clone();
    (rig, devices)
}

fn inputs(rig: &Rig, iteration: u64) -> Vec<RankInput> {
    let config = rig.config();
    let input = |rank: u32| {
        let key = InputKey { seed: 3, iteration, rank: Rank(rank as u16) };
        RankInput::generate(config, Routing::Uniform, key, config.max_tokens)
    };
    (0..config.num_ranks).map(input).collect()
}

fn whole_step(rig: &Rig, iteration: u64) {
    let verdict = rig.step(&inputs(rig, iteration), &StepPlan::default()).unwrap();
    assert_eq!((verdict.wrong, verdict.lost), (0, 0), "{verdict:?}");
}

#[test]
fn a_queue_that_failed_is_evidence_against_its_peer_until_it_is_replaced() {
    let (rig, devices) = rig();
    whole_step(&rig, 0);
    let session = rig.world().session(Rank(0));
    let failures = |qpn| {
        [AsyncEvent::QpFatal { qpn }, AsyncEvent::QpRequestError { qpn }, AsyncEvent::QpAccessError { qpn }]
    };
    for (round, peer) in [Rank(1), Rank(2), Rank(1)].into_iter().enumerate() {
        let event = failures(session.queue_pairs(peer)[1])[round];
        assert!(devices[0].report(event));
        assert_eq!(session.take_device_events().unwrap(), [DeviceEvent { event, peer: Some(peer) }]);
        assert_eq!(session.suspected().unwrap(), [peer], "as if a kernel had met it");
        assert_eq!(session.device_evidence(peer), Some(event));
        rig.world().replace_peer(peer, Replacement::default()).unwrap();
        assert_eq!((session.suspected().unwrap(), session.device_evidence(peer)), (vec![], None));
        // The queue is gone: what is still said of it concerns nobody.
        assert!(devices[0].report(event));
        assert_eq!(session.take_device_events().unwrap(), [DeviceEvent { event, peer: None }]);
        assert_eq!(session.suspected().unwrap(), []);
        whole_step(&rig, 1 + round as u64);
    }
    let counts = DeviceEventCounts { queue_failures: 3, foreign_failures: 3, ..DeviceEventCounts::default() };
    assert_eq!(session.telemetry().unwrap().device_events, counts);
}

#[test]
fn what_concerns_no_peer_is_told_and_accuses_nobody() {
    let (rig, devices) = rig();
    let session = rig.world().session(Rank(0));
    let (down, up) = (AsyncEvent::PortDown { port_num: 1 }, AsyncEvent::PortUp { port_num: 1 });
    devices[0].inner().set_port_up(false);
    devices[0].inner().set_port_up(true);
    devices[0].inner().announce_new_address();
    let stranger = AsyncEvent::CqError { cqn: CqNum::new(0xff_fff0) };
    assert!(devices[0].report(stranger));
    assert!(devices[0].report(AsyncEvent::Completion { cqn: CqNum::new(1) }));
    let told = session.take_device_events().unwrap();
    let changed = AsyncEvent::AddressChanged { port_num: 1 };
    assert_eq!(told, [stranger, down, up, changed].map(|event| DeviceEvent { event, peer: None }));
    assert_eq!(session.suspected().unwrap(), []);
    let counts = DeviceEventCounts {
        foreign_failures: 1,
        ports_down: 1,
        ports_up: 1,
        addresses_changed: 1,
        ..DeviceEventCounts::default()
    };
    assert_eq!(session.device_event_counts(), counts);
    // A link that was away for a moment costs nothing.
    whole_step(&rig, 0);
}

#[test]
fn a_completion_queue_and_a_control_queue_pair_have_peers_too() {
    let (rig, devices) = rig();
    let session = rig.world().session(Rank(0));
    // Numbers count from 1 and from 0x100 on an emulated device; peer 1 was connected first, its channels before its
    // control queue pair.
    let of_control = QpNum::new(session.queue_pairs(Rank(1))[1].get() + 1);
    assert!(!session.queue_pairs(Rank(2)).contains(&of_control));
    assert!(devices[0].report(AsyncEvent::QpFatal { qpn: of_control }));
    assert!(devices[0].report(AsyncEvent::CqError { cqn: CqNum::new(1) }));
    let peers: Vec<_> = session.take_device_events().unwrap().iter().map(|told| told.peer).collect();
    assert_eq!(peers, [Some(Rank(1)), Some(Rank(1))]);
}

#[test]
fn a_rank_without_its_device_gives_up_on_everybody_and_lets_go_of_everything() {
    const GONE: Rank = Rank(2);
    let (rig, devices) = rig();
    whole_step(&rig, 0);
    let session = rig.world().session(GONE);
    devices[GONE.index()].inner().remove();
    let told = session.take_device_events().unwrap();
    assert_eq!(told, [DeviceEvent { event: AsyncEvent::DeviceRemoved, peer: None }]);
    assert_eq!(session.suspected().unwrap(), [Rank(0), Rank(1)]);
    assert_eq!(session.device_evidence(Rank(0)), Some(AsyncEvent::DeviceRemoved));
    assert_eq!(session.telemetry().unwrap().device_events.removals, 1);
    // A step that meets it. Nobody waits for a clock, and the rank without a device for no completion: the others'
    // hosts stop their side, as their keepers would.
    let (inputs, plan) = (inputs(&rig, 1), StepPlan::default());
    rig.load(&inputs, &plan).unwrap();
    rig.launch(rig.config().max_topk, &plan).unwrap();
    for rank in [Rank(0), Rank(1)] {
        rig.world().session(rank).begin_fence(GONE).unwrap();
    }
    rig.synchronize().unwrap();
    let verdict = rig.check(&inputs).unwrap();
    assert_eq!(verdict.wrong, 0, "what is missing is said to be: {verdict:?}");
    assert!(verdict.lost > 0);
    for rank in [Rank(0), Rank(1)] {
        assert!(rig.world().session(rank).suspected().unwrap().contains(&GONE), "{rank}");
    }
    let error = rig.world().replace_peer(GONE, Replacement::default()).unwrap_err();
    let Error::Command(refused) = &error else { panic!("{error:?}") };
    assert_eq!(refused.status, Status::BadSysState);
    drop(rig);
    for device in &devices {
        assert_eq!(device.inner().object_counts(), ObjectCounts::default(), "nothing is left");
    }
}

/// Refuses the k-th call of one device while a world is made.
fn refuse(rank: Rank, skip: u32) -> Option<Error> {
    let effect = Effect::Refuse(Status::Lim);
    let (options, devices) = options(Some((rank, Fault { op: None, skip, effect })));
    let made = World::new(&Config { num_ranks: 2, num_experts: 4, ..config() }, &options);
    let error = made.as_ref().err().is_some();
    let devices = devices.lock().clone();
    let struck = devices.get(rank.index()).is_some_and(|device| device.pending() == 0);
    devices.iter().for_each(|device| device.clear());
    assert_eq!(error, struck, "call {skip} of rank {rank}");
    let error = made.map(drop).err();
    for device in &devices {
        let left = device.inner().object_counts();
        assert_eq!(left, ObjectCounts::default(), "call {skip} of rank {rank} refused: {error:?}");
    }
    error
}

/// Two ranks without anything that works beside them, so that every call is the bring-up's own.
fn pair(gpus: &[Arc<HostGpu>; 2], devices: &[Arc<EmulatedHca>; 2]) -> Result<[Session; 2], Error> {
    let config = Config { num_ranks: 2, num_experts: 4, channels: Some(1), ..config() }.validate()?;
    let base = [[1; 2]];
    let session = |rank: u16| {
        let (gpu, hca) = (Arc::clone(&gpus[usize::from(rank)]), Arc::clone(&devices[usize::from(rank)]));
        Session::new(&config, Rank(rank), gpu, hca)
    };
    let [near, far] = [session(0)?, session(1)?];
    near.start_at(&base)?;
    far.start_at(&base)?;
    let (to_far, to_near) = (near.offer(Rank(1), None)?, far.offer(Rank(0), None)?);
    near.connect(&to_near, &base)?;
    far.connect(&to_far, &base)?;
    near.activate(Rank(1))?;
    far.activate(Rank(0))?;
    Ok([near, far])
}

#[test]
fn every_call_to_a_gpu_may_fail_while_ranks_come_up_and_nothing_is_left() {
    let pool = Arc::new(Pool::new(PoolConfig::simulation(1)).unwrap());
    let gpus = [0, 1].map(|device| Arc::new(HostGpu::new(Arc::clone(&pool), device)));
    let fabric = Fabric::inproc(FabricConfig::default());
    let devices = [0, 1].map(|_| EmulatedHca::new(Arc::clone(&fabric), EmulatedConfig::default()).unwrap());
    for end in 0..2 {
        for skip in 0.. {
            gpus[end].fail_access(Some(skip));
            let made = pair(&gpus, &devices);
            let has_struck = !gpus[end].fail_access(None);
            match &made {
                Ok(_) if !has_struck => {
                    assert!(skip >= 25, "rank {end}: {skip} calls");
                    break;
                }
                Err(Error::Gpu(GpuError::Os { code: libc::EIO, .. })) => {}
                other => panic!("call {skip} of rank {end}: {:?}", other.as_ref().err()),
            }
            drop(made);
            assert_eq!(gpus.each_ref().map(|gpu| gpu.allocated_bytes()), [0; 2], "call {skip} of rank {end}");
            for device in &devices {
                assert_eq!(device.object_counts(), ObjectCounts::default(), "call {skip} of rank {end}");
            }
        }
    }
}

#[test]
fn every_call_of_bring_up_may_be_refused_and_nothing_is_left() {
    for rank in [Rank(0), Rank(1)] {
        let mut refused = 0;
        while let Some(error) = refuse(rank, refused) {
            let Error::Command(command) = &error else { panic!("call {refused}: {error:?}") };
            assert_eq!(command.status, Status::Lim);
            refused += 1;
        }
        // A domain, two umems, keys; a page, two queues and three transitions of each channel and the control queue.
        assert!(refused >= 20, "{refused} calls");
    }
}
