//! Asynchronous events of a device: of its queues, through DevX; of the device and its port, through verbs.
//!
//! *Who owns what.* [`Events`] owns the DevX event channel. Both sources are read without waiting, into a queue if
//! it is only asked whether the device still exists.
//!
//! INVARIANT: a cookie says which event of which object it is, so an event means something after its object is gone.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use ibex_abi::eqe::EventType;
use ibex_abi::types::{CqNum, QpNum};
use ibex_mlx5dv_sys::{self as sys, DevxEvents};
use parking_lot::Mutex;

use super::devices::Opened;
use super::table::QueueKind;
use crate::AsyncEvent;

/// Events of queue pairs that are told.
const OF_QP: [EventType; 3] = [EventType::QpFatal, EventType::QpRequestError, EventType::QpAccessError];
/// Events of completion queues that are told.
const OF_CQ: [EventType; 1] = [EventType::CqError];

/// The sources of events of one open device.
#[derive(Debug)]
pub(super) struct Events {
    channel: Option<Channel>,
    /// Verbs' own events can be read without waiting.
    has_verbs: bool,
    /// Events of the device that were read and not taken.
    of_device: Mutex<VecDeque<AsyncEvent>>,
    /// The device is gone, or failed for good.
    is_gone: AtomicBool,
}

/// Most events of the device that are read ahead of whoever takes them.
const READ_AHEAD_MAX: usize = 64;

impl Events {
    /// Opens what the libraries offer; a device without events is used without them.
    pub(super) fn open(opened: &Arc<Opened>) -> Self {
        let channel = opened.library().devx_events().and_then(|functions| Channel::open(opened, *functions));
        let has_verbs = never_wait(opened.async_fd());
        Self { channel, has_verbs, of_device: Mutex::default(), is_gone: AtomicBool::new(false) }
    }

    /// Events of queues arrive.
    pub(super) const fn has_queues(&self) -> bool {
        self.channel.is_some()
    }

    /// Asks for the events of a queue that was just created.
    pub(super) fn subscribe(&self, kind: QueueKind, number: u32, handle: *mut sys::mlx5dv_devx_obj) {
        let Some(channel) = &self.channel else { return };
        let events = match kind {
            QueueKind::Qp => &OF_QP[..],
            QueueKind::Cq => &OF_CQ[..],
        };
        for event in events {
            channel.subscribe(handle, *event, cookie(*event, number));
        }
    }

    /// The next event that waits.
    pub(super) fn next(&self, opened: &Opened) -> Option<AsyncEvent> {
        let of_queue = self.channel.as_ref().and_then(Channel::next);
        of_queue.or_else(|| {
            let mut waiting = self.of_device.lock();
            self.read_ahead(opened, &mut waiting);
            waiting.pop_front()
        })
    }

    /// The kernel has said that the device is gone. Nothing that stood on it exists any more, though calls that
    /// release it fail.
    pub(super) fn is_gone(&self, opened: &Opened) -> bool {
        self.read_ahead(opened, &mut self.of_device.lock());
        self.is_gone.load(Ordering::Acquire)
    }

    fn read_ahead(&self, opened: &Opened, waiting: &mut VecDeque<AsyncEvent>) {
        while self.has_verbs && waiting.len() < READ_AHEAD_MAX {
            let Some(event) = of_device(opened) else { break };
            if event == Some(AsyncEvent::DeviceRemoved) {
                self.is_gone.store(true, Ordering::Release);
            }
            waiting.extend(event);
        }
    }
}

const fn code_of(event: EventType) -> u8 {
    // CAST: a fieldless enum of representation u8.
    event as u8
}

/// Event type and number of the object, in one word.
fn cookie(event: EventType, number: u32) -> u64 {
    u64::from(code_of(event)) << 32 | u64::from(number)
}

fn event_of(cookie: u64) -> Option<AsyncEvent> {
    // CAST: the halves of the word.
    let (code, number) = ((cookie >> 32) as u8, cookie as u32);
    Some(match EventType::ALL.into_iter().find(|event| code_of(*event) == code)? {
        EventType::CqError => AsyncEvent::CqError { cqn: CqNum::new(number) },
        EventType::QpFatal => AsyncEvent::QpFatal { qpn: QpNum::new(number) },
        EventType::QpRequestError => AsyncEvent::QpRequestError { qpn: QpNum::new(number) },
        EventType::QpAccessError => AsyncEvent::QpAccessError { qpn: QpNum::new(number) },
        _ => return None,
    })
}

/// The next event of the device and its ports, if there is any; it may be one of no concern. Those of objects are
/// DevX's to tell.
fn of_device(opened: &Opened) -> Option<Option<AsyncEvent>> {
    let mut event = std::mem::MaybeUninit::<sys::ibv_async_event>::zeroed();
    // SAFETY: an open context whose descriptor does not wait, and room for an event.
    let code = unsafe { opened.library().ibv_get_async_event(opened.context(), event.as_mut_ptr()) };
    if code != 0 {
        return None;
    }
    // SAFETY: filled by a call that succeeded; the number of a port is a plain integer whatever the event.
    let (kind, port) = unsafe {
        let event = event.assume_init_mut();
        let found = (event.event_type, event.element.port_num);
        opened.library().ibv_ack_async_event(event);
        found
    };
    let port_num = u8::try_from(port).unwrap_or(0);
    Some(Some(match kind {
        sys::IBV_EVENT_PORT_ACTIVE => AsyncEvent::PortUp { port_num },
        sys::IBV_EVENT_PORT_ERR => AsyncEvent::PortDown { port_num },
        sys::IBV_EVENT_GID_CHANGE | sys::IBV_EVENT_LID_CHANGE => AsyncEvent::AddressChanged { port_num },
        sys::IBV_EVENT_DEVICE_FATAL => AsyncEvent::DeviceRemoved,
        _ => return Some(None),
    }))
}

/// Reads on this descriptor return at once; false if it has none.
fn never_wait(fd: i32) -> bool {
    // SAFETY: system calls on a descriptor that the device's context keeps open.
    unsafe {
        let flags = libc::fcntl(fd, libc::F_GETFL);
        flags >= 0 && libc::fcntl(fd, libc::F_SETFL, flags | libc::O_NONBLOCK) == 0
    }
}

/// An event channel of DevX.
#[derive(Debug)]
struct Channel {
    functions: DevxEvents,
    channel: *mut sys::mlx5dv_devx_event_channel,
    /// Keeps the context, and with it the library.
    _opened: Arc<Opened>,
}

// SAFETY: the library allows calls on one channel from any thread; the pointer is released once, on drop.
unsafe impl Send for Channel {}
// SAFETY: as above.
unsafe impl Sync for Channel {}

impl Channel {
    fn open(opened: &Arc<Opened>, functions: DevxEvents) -> Option<Self> {
        let flags = sys::MLX5DV_DEVX_EVENT_CHANNEL_OMIT_DATA;
        // SAFETY: an open context.
        let channel = unsafe { (functions.create_channel)(opened.context(), flags) };
        if channel.is_null() {
            return None;
        }
        let made = Self { functions, channel, _opened: Arc::clone(opened) };
        // SAFETY: the library's structure, which lives as long as the channel.
        let fd = unsafe { (*channel).fd };
        never_wait(fd).then_some(made)
    }

    /// A device that does not tell of an event is used without it.
    fn subscribe(&self, handle: *mut sys::mlx5dv_devx_obj, event: EventType, cookie: u64) {
        let mut numbers = [u16::from(code_of(event))];
        // CAST: the size of two bytes.
        let size = size_of_val(&numbers) as u16;
        // SAFETY: a live channel, a live object of its context, and a list that is read during the call.
        let _ =
            unsafe { (self.functions.subscribe)(self.channel, handle, size, numbers.as_mut_ptr(), cookie) };
    }

    fn next(&self) -> Option<AsyncEvent> {
        let mut header = sys::mlx5dv_devx_async_event_hdr::default();
        // SAFETY: a live channel whose descriptor does not wait, and room for a header without data.
        let read = unsafe { (self.functions.get)(self.channel, &mut header, size_of_val(&header)) };
        if read <= 0 {
            return None;
        }
        event_of(header.cookie)
    }
}

impl Drop for Channel {
    fn drop(&mut self) {
        // SAFETY: made once, destroyed once; nobody reads it any more.
        unsafe { (self.functions.destroy_channel)(self.channel) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cookie_names_event_and_object() {
        let number = 0x00ab_cdef;
        let event = |kind| event_of(cookie(kind, number));
        assert_eq!(event(EventType::CqError), Some(AsyncEvent::CqError { cqn: CqNum::new(number) }));
        assert_eq!(event(EventType::QpFatal), Some(AsyncEvent::QpFatal { qpn: QpNum::new(number) }));
        let access = AsyncEvent::QpAccessError { qpn: QpNum::new(number) };
        assert_eq!(event(EventType::QpAccessError), Some(access));
        assert_eq!(event_of(7), None);
    }
}
