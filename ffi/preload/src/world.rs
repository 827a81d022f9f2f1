//! The devices of this process, and the threads that serve them.
//!
//! *Who owns what.* The world is made when somebody first looks for a device, and lives until the process ends. It owns
//! the devices, one event queue on each, which plays the part of the kernel driver's, the thread that steps the
//! devices and the thread that reads the event queues.
//!
//! INVARIANT: the tables that say who hears of an event are locked while an event is delivered; whoever has left them
//! hears no more. INVARIANT: no listener is dropped under that lock: it may close a file, and `close` is ours too.

use std::collections::{HashMap, HashSet};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::thread::Thread;

use ibex_abi::eqe::{Event, EventType, PortChange};
use ibex_abi::types::{CqNum, Eqn, Gid, Mac, QpNum};
use ibex_hca::control_region::ControlRegion;
use ibex_hca::emulated::{Backoff, DeviceThread, EmulatedConfig, EmulatedHca, Fabric, FabricConfig};
use ibex_hca::host_eq::HostEq;
use ibex_hca::{CommandError, Hca, PortInfo};
use parking_lot::Mutex;

use crate::errno::Errno;
use crate::report;
use crate::settings::Settings;
use crate::sysfs;
use crate::uverbs::events::{AsyncKind, EventFile};

/// The firmware version that the devices claim.
pub(crate) const FIRMWARE: &str = "22.44.0001";
/// The same as a number: 16 bits each, the last one lowest.
pub(crate) const FIRMWARE_CODE: u64 = 22 << 32 | 44 << 16 | 1;
/// PCI domain of the devices.
pub(crate) const PCI_DOMAIN: &str = "1be8";
/// IOMMU group of the first device.
const FIRST_GROUP: usize = 7144;
/// Log2 of the entries of an event queue.
const LOG_EQ: u8 = 12;
/// What programs are told of, besides completions.
const EVENTS: [EventType; 5] = [
    EventType::CqError,
    EventType::QpFatal,
    EventType::QpRequestError,
    EventType::QpAccessError,
    EventType::PortChange,
];
/// Bytes that the event queue and its neighbours need.
const REGION_LEN: u64 = 1 << 20;
/// How long the event thread sleeps when nothing happened, in microseconds.
const NAP_US: libc::c_uint = 200;

/// Who hears of a completion queue.
#[derive(Debug)]
pub(crate) struct CqListener {
    /// What the program calls the queue.
    pub(crate) user_handle: u64,
    pub(crate) channel: Option<Arc<EventFile>>,
    pub(crate) asynchronous: Option<Arc<EventFile>>,
}

/// Who hears of a queue pair.
#[derive(Debug)]
pub(crate) struct QpListener {
    /// What the program calls the queue pair.
    pub(crate) user_handle: u64,
    pub(crate) asynchronous: Option<Arc<EventFile>>,
}

/// Who hears of one kind of event of one queue through DevX.
#[derive(Debug)]
pub(crate) struct Subscription {
    pub(crate) of: Subject,
    pub(crate) event: EventType,
    /// What the program gets to read.
    pub(crate) cookie: u64,
    pub(crate) file: Arc<EventFile>,
}

/// A queue that has events.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Subject {
    Cq(CqNum),
    Qp(QpNum),
}

impl Subject {
    /// Whose event it is; none if it is no queue's.
    const fn of(event: Event) -> Option<Self> {
        Some(match event {
            Event::Completion(cqn) | Event::CqError(cqn, _) => Self::Cq(cqn),
            Event::QpFatal(qpn) | Event::QpRequestError(qpn) | Event::QpAccessError(qpn) => Self::Qp(qpn),
            Event::PortChange { .. } | Event::CommandsDone { .. } => return None,
        })
    }
}

#[derive(Debug, Default)]
struct Listeners {
    cqs: HashMap<CqNum, CqListener>,
    qps: HashMap<QpNum, QpListener>,
    subscriptions: Vec<Subscription>,
    /// Files of asynchronous events, of all contexts; the contexts own them.
    files: Vec<Weak<EventFile>>,
}

/// A device with the kernel driver's part of it.
#[derive(Debug)]
pub(crate) struct Device {
    idx: usize,
    hca: Arc<EmulatedHca>,
    eq: Mutex<HostEq>,
    eqn: Eqn,
    listeners: Mutex<Listeners>,
    /// Doorbell pages that programs got, ever: they stay mapped.
    pages: Mutex<HashSet<u64>>,
}

impl Device {
    fn new(idx: usize, fabric: &Arc<Fabric>, config: EmulatedConfig) -> Result<Self, Errno> {
        let hca = EmulatedHca::new(Arc::clone(fabric), config)?;
        let region = ControlRegion::host(&(Arc::clone(&hca) as Arc<dyn Hca>), REGION_LEN)?;
        let eq = HostEq::create(&region, LOG_EQ, &EVENTS)?;
        let eqn = eq.eqn();
        Ok(Self { idx, hca, eq: Mutex::new(eq), eqn, listeners: Mutex::default(), pages: Mutex::default() })
    }

    pub(crate) const fn hca(&self) -> &Arc<EmulatedHca> {
        &self.hca
    }

    pub(crate) fn port(&self) -> PortInfo {
        self.hca.port()
    }

    /// Runs a mailbox of the program's, and keeps a record of it if one is wanted.
    pub(crate) fn exec(&self, input: &[u8], output: &mut [u8]) -> Result<(), CommandError> {
        let done = self.hca.exec(input, output);
        report::keep_mailbox(&self.name(), input, output);
        done
    }

    /// The event queue that completion queues name.
    pub(crate) const fn eqn(&self) -> Eqn {
        self.eqn
    }

    /// Its name among RDMA devices.
    pub(crate) fn name(&self) -> String {
        format!("mlx5_{}", self.idx)
    }

    /// The name of its character device.
    pub(crate) fn node_name(&self) -> String {
        format!("uverbs{}", self.idx)
    }

    /// Its name on the PCI bus, in a domain that no machine has.
    pub(crate) fn pci_name(&self) -> String {
        format!("{PCI_DOMAIN}:00:{:02x}.0", self.idx)
    }

    /// The number of its IOMMU group.
    pub(crate) const fn group(&self) -> usize {
        FIRST_GROUP + self.idx
    }

    /// Its globally unique identifier.
    pub(crate) const fn guid(&self) -> u64 {
        0x021b_e8ff_fe00_0000 | self.idx as u64
    }

    /// A program gets the doorbell page at this address.
    pub(crate) fn note_page(&self, addr: u64) {
        self.pages.lock().insert(addr);
    }

    /// A context has a file of asynchronous events.
    pub(crate) fn listen(&self, file: &Arc<EventFile>) {
        let mut listeners = self.listeners.lock();
        listeners.files.retain(|file| file.strong_count() != 0);
        listeners.files.push(Arc::downgrade(file));
        drop(listeners);
        wake_event_thread();
    }

    /// Tells every context of something that concerns the port or the whole device.
    fn tell_all(&self, element: u64, kind: AsyncKind) {
        let files: Vec<_> = self.listeners.lock().files.iter().filter_map(Weak::upgrade).collect();
        files.iter().for_each(|file| file.push_async(element, kind));
    }

    /// Tells every context that the device is gone. No event queue says so: it is the kernel's word.
    pub(crate) fn tell_removed(&self) {
        self.tell_all(0, AsyncKind::DeviceFatal);
    }

    pub(crate) fn listen_cq(&self, cqn: CqNum, listener: CqListener) {
        let before = self.listeners.lock().cqs.insert(cqn, listener);
        drop(before);
        wake_event_thread();
    }

    pub(crate) fn listen_qp(&self, qpn: QpNum, listener: QpListener) {
        let before = self.listeners.lock().qps.insert(qpn, listener);
        drop(before);
        wake_event_thread();
    }

    pub(crate) fn subscribe(&self, subscription: Subscription) {
        self.listeners.lock().subscriptions.push(subscription);
        wake_event_thread();
    }

    /// Ends the subscriptions that `is_over` names.
    pub(crate) fn unsubscribe(&self, is_over: impl Fn(&Subscription) -> bool) {
        let mut listeners = self.listeners.lock();
        let (over, kept) = listeners.subscriptions.drain(..).partition::<Vec<_>, _>(is_over);
        listeners.subscriptions = kept;
        drop(listeners);
        drop(over);
    }

    pub(crate) fn forget_cq(&self, cqn: CqNum) -> Option<CqListener> {
        self.listeners.lock().cqs.remove(&cqn)
    }

    pub(crate) fn forget_qp(&self, qpn: QpNum) -> Option<QpListener> {
        self.listeners.lock().qps.remove(&qpn)
    }

    /// Delivers what stands in the event queue; whether anything did.
    fn deliver_events(&self) -> bool {
        let mut eq = self.eq.lock();
        let mut delivered = false;
        loop {
            match eq.poll() {
                Ok(None) => break,
                Ok(Some(event)) => self.deliver(event),
                // An event of a type that nobody here can be told of.
                Err(_) => {}
            }
            delivered = true;
        }
        if delivered {
            eq.update(true);
        }
        delivered
    }

    fn deliver(&self, event: Event) {
        if let Event::PortChange { port, change } = event {
            let kind = match change {
                PortChange::Active => AsyncKind::PortActive,
                PortChange::Down => AsyncKind::PortError,
                PortChange::Lid => AsyncKind::LidChange,
                PortChange::Guid => AsyncKind::GidChange,
            };
            return self.tell_all(port.into(), kind);
        }
        let listeners = self.listeners.lock();
        let subject = Subject::of(event);
        for told in &listeners.subscriptions {
            if Some(told.of) == subject && told.event == event.event_type() {
                told.file.push_cookie(told.cookie);
            }
        }
        let tell_qp = |qpn, kind| {
            if let Some(listener) = listeners.qps.get(&qpn)
                && let Some(file) = &listener.asynchronous
            {
                file.push_async(listener.user_handle, kind);
            }
        };
        match event {
            Event::Completion(cqn) => {
                if let Some(listener) = listeners.cqs.get(&cqn)
                    && let Some(channel) = &listener.channel
                {
                    channel.push_completion(listener.user_handle);
                }
            }
            Event::CqError(cqn, _) => {
                if let Some(listener) = listeners.cqs.get(&cqn)
                    && let Some(file) = &listener.asynchronous
                {
                    file.push_async(listener.user_handle, AsyncKind::CqError);
                }
            }
            Event::QpFatal(qpn) => tell_qp(qpn, AsyncKind::QpFatal),
            Event::QpRequestError(qpn) => tell_qp(qpn, AsyncKind::QpRequestError),
            Event::QpAccessError(qpn) => tell_qp(qpn, AsyncKind::QpAccessError),
            // Told above; and the commands of this driver are calls.
            Event::PortChange { .. } | Event::CommandsDone { .. } => {}
        }
    }

    fn has_listeners(&self) -> bool {
        let listeners = self.listeners.lock();
        let has_files = listeners.files.iter().any(|file| file.strong_count() != 0);
        has_files
            || !listeners.cqs.is_empty()
            || !listeners.qps.is_empty()
            || !listeners.subscriptions.is_empty()
    }
}

/// All that this process has of the emulated world.
#[derive(Debug)]
pub(crate) struct World {
    pub(crate) settings: Settings,
    pub(crate) devices: Vec<Device>,
    sysfs_root: PathBuf,
    stepper: DeviceThread,
    event_thread: Thread,
}

static WORLD: OnceLock<Option<World>> = OnceLock::new();
/// Where libibverbs is told to look; chosen when the library is loaded.
static SYSFS_ROOT: OnceLock<PathBuf> = OnceLock::new();
/// Whether the event thread has somebody to serve.
static EVENT_THREAD_WANTED: AtomicBool = AtomicBool::new(false);

/// Chooses the directory of the sysfs tree, which does not exist yet.
pub(crate) fn choose_sysfs_root(dir: &Path) -> &'static Path {
    SYSFS_ROOT.get_or_init(|| dir.join(format!("ibex-preload-{}", std::process::id())))
}

/// Where the tree has the PCI device that a path of the real sysfs would name; none if it is no device of ours.
pub(crate) fn pci_path(path: &Path) -> Option<PathBuf> {
    let rest = path.strip_prefix("/sys").ok()?;
    let name = rest.strip_prefix("bus/pci/devices").ok()?.components().next()?;
    if !name.as_os_str().to_str()?.starts_with(PCI_DOMAIN) {
        return None;
    }
    get().map(|world| world.sysfs_root.join(rest))
}

/// Whether a path lies in the sysfs tree.
pub(crate) fn is_in_sysfs(path: &Path) -> bool {
    SYSFS_ROOT.get().is_some_and(|root| path.starts_with(root))
}

/// The world, made now if need be; none if it could not be made, which is said once.
pub(crate) fn get() -> Option<&'static World> {
    WORLD.get_or_init(|| make().map_err(|why| say(&why)).ok()).as_ref()
}

/// The world, if anybody has asked for it.
pub(crate) fn existing() -> Option<&'static World> {
    WORLD.get()?.as_ref()
}

/// Whether a doorbell page lies at this address.
pub(crate) fn is_page(addr: u64) -> bool {
    existing().is_some_and(|world| world.devices.iter().any(|device| device.pages.lock().contains(&addr)))
}

/// Tells the person who started the program, who has no other way to hear it.
pub(crate) fn say(why: &str) {
    // There is nobody to tell that nobody could be told.
    let _ = writeln!(std::io::stderr(), "ibex-preload: {why}");
}

fn make() -> Result<World, String> {
    let settings = Settings::from_env().map_err(|bad| bad.to_string())?;
    let fabric = Fabric::inproc(FabricConfig::default());
    let (link, doorbells) = (settings.link, settings.doorbells);
    let config = EmulatedConfig { link, doorbells, second_register: true, ..EmulatedConfig::default() };
    let made = (0..settings.num_devices).map(|idx| Device::new(idx, &fabric, config));
    let devices = made.collect::<Result<Vec<_>, _>>().map_err(|errno| format!("no device: {errno}"))?;
    let sysfs_root = choose_sysfs_root(&settings.dir).to_owned();
    sysfs::make(&sysfs_root, &devices).map_err(|error| format!("{}: {error}", sysfs_root.display()))?;
    let stepped = devices.iter().map(|device| Arc::clone(&device.hca)).collect();
    let no_thread = |error: std::io::Error| format!("no thread: {error}");
    let stepper = DeviceThread::spawn(stepped, Backoff::default()).map_err(no_thread)?;
    let events = std::thread::Builder::new().name("ibex-events".into()).spawn(serve_events);
    let event_thread = events.map_err(no_thread)?.thread().clone();
    report::at_exit();
    Ok(World { settings, devices, sysfs_root, stepper, event_thread })
}

impl World {
    /// Waits until the devices are idle, at most `nanos` for their timers.
    pub(crate) fn settle(&self, nanos: u64) {
        self.stepper.settle(nanos);
        // Else they would be delivered by the thread, a nap later.
        for device in &self.devices {
            device.deliver_events();
        }
    }

    /// The Ethernet address of the port with this GID, as the neighbour table of a kernel would know it.
    pub(crate) fn mac_of(&self, gid: Gid) -> Option<Mac> {
        self.devices.iter().map(Device::port).find(|port| port.gid == gid).map(|port| port.mac)
    }

    /// Removes the sysfs tree.
    pub(crate) fn remove_sysfs(&self) {
        // What is left is a few small files in a directory for temporary ones.
        let _ = std::fs::remove_dir_all(&self.sysfs_root);
    }
}

fn wake_event_thread() {
    EVENT_THREAD_WANTED.store(true, Ordering::Release);
    if let Some(world) = existing() {
        world.event_thread.unpark();
    }
}

/// Reads the event queues of all devices for as long as the process lives.
fn serve_events() {
    loop {
        while !EVENT_THREAD_WANTED.load(Ordering::Acquire) {
            std::thread::park();
        }
        let Some(world) = existing() else { continue };
        let mut served = false;
        for device in &world.devices {
            served |= device.deliver_events();
        }
        if served {
            continue;
        }
        if !world.devices.iter().any(Device::has_listeners) {
            EVENT_THREAD_WANTED.store(false, Ordering::Release);
            // Whoever came between the two lines is looked for once more.
            if world.devices.iter().any(Device::has_listeners) {
                EVENT_THREAD_WANTED.store(true, Ordering::Release);
            }
        }
        nap();
    }
}

/// Sleeps a little, or less if a signal comes.
pub(crate) fn nap() {
    // SAFETY: takes a number and touches no memory.
    unsafe { libc::usleep(NAP_US) };
}
