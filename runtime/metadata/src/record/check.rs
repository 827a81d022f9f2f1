//! The rules that a record must keep, on its way out as on its way in.

use super::{Buffer, PeerRecord, Transport, Way, record_error};
use crate::error::{DecodeError, Part, Problem};
use crate::limits::{BUFFERS_MAX, DEVICES_MAX, MANIFESTS_MAX, TRANSPORTS_MAX};

impl PeerRecord {
    /// Checks every rule.
    ///
    /// # Errors
    /// The first rule that is broken, with the field.
    pub fn check(&self) -> Result<(), DecodeError> {
        self.key()?;
        let lists = [
            (11, self.devices.len(), DEVICES_MAX),
            (12, self.transports.len(), TRANSPORTS_MAX),
            (13, self.buffers.len(), BUFFERS_MAX),
            (14, self.manifests.len(), MANIFESTS_MAX),
        ];
        for (field, count, max) in lists {
            if count > max {
                let problem = Problem::TooMany { count: count as u64, max: max as u64 };
                return Err(record_error(field, problem));
            }
        }
        self.transports.iter().try_for_each(check_transport)?;
        self.buffers.iter().try_for_each(|buffer| check_buffer(buffer, self.devices.len()))?;
        check_ids(&self.buffers)?;
        check_overlap(&self.buffers)
    }
}

fn check_transport(transport: &Transport) -> Result<(), DecodeError> {
    let fail = |part, field, problem| Err(DecodeError { part, field, problem });
    match &transport.way {
        Way::EpIbgda(body) if body.port.is_none() => fail(Part::EpIbgda, 4, Problem::Missing),
        Way::Unknown { kind, .. } if kind.is_empty() => fail(Part::Transport, 1, Problem::Missing),
        _ => Ok(()),
    }
}

fn check_buffer(buffer: &Buffer, num_devices: usize) -> Result<(), DecodeError> {
    let fail = |field, problem| Err(buffer_error(field, problem));
    if buffer.len == 0 {
        return fail(3, Problem::Empty);
    }
    if buffer.addr.checked_add(buffer.len - 1).is_none() {
        return fail(3, Problem::Overflow);
    }
    if !buffer.keys.is_empty() && buffer.keys.len() != num_devices {
        let (keys, devices) = (buffer.keys.len() as u64, num_devices as u64);
        return fail(8, Problem::Keys { keys, devices });
    }
    Ok(())
}

fn check_ids(buffers: &[Buffer]) -> Result<(), DecodeError> {
    let mut ids: Vec<_> = buffers.iter().map(|buffer| buffer.buffer_id).collect();
    ids.sort_unstable();
    if ids.windows(2).any(|pair| pair[0] == pair[1]) {
        return Err(buffer_error(1, Problem::Duplicate));
    }
    Ok(())
}

/// Live buffers of one location share no byte. One that drains may: registering its range again gives a
/// new buffer before the old one is gone.
fn check_overlap(buffers: &[Buffer]) -> Result<(), DecodeError> {
    let mut live: Vec<_> = buffers.iter().filter(|buffer| buffer.state.is_live()).collect();
    live.sort_unstable_by_key(|buffer| (&buffer.location, buffer.addr));
    let overlaps = |a: &Buffer, b: &Buffer| a.location == b.location && a.addr + (a.len - 1) >= b.addr;
    if live.windows(2).any(|pair| overlaps(pair[0], pair[1])) {
        return Err(buffer_error(2, Problem::Overlap));
    }
    Ok(())
}

fn buffer_error(field: u32, problem: Problem) -> DecodeError {
    DecodeError { part: Part::Buffer, field, problem }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::BufferId;
    use crate::name::RecordName;
    use crate::record::{BufferState, Device, EpIbgda, Identity};

    fn record(buffers: &[(u64, u64, u64, BufferState)]) -> PeerRecord {
        let name = RecordName::parse("a/b/c").unwrap();
        let buffer = |&(id, addr, len, state)| Buffer {
            buffer_id: BufferId(id),
            addr,
            len,
            state,
            ..Buffer::default()
        };
        let buffers = buffers.iter().map(buffer).collect();
        PeerRecord { buffers, ..PeerRecord::empty(&name, Identity::Legacy) }
    }

    fn problem(record: &PeerRecord) -> Problem {
        record.check().unwrap_err().problem
    }

    #[test]
    fn lengths_and_addresses_are_checked_to_the_last_byte() {
        let ready = BufferState::Ready;
        assert_eq!(record(&[(1, u64::MAX, 1, ready)]).check(), Ok(()));
        assert_eq!(record(&[(1, 0, u64::MAX, ready)]).check(), Ok(()));
        assert_eq!(problem(&record(&[(1, u64::MAX, 2, ready)])), Problem::Overflow);
        assert_eq!(problem(&record(&[(1, 7, 0, ready)])), Problem::Empty);
    }

    #[test]
    fn live_buffers_share_no_byte_but_draining_ones_may() {
        let (ready, draining) = (BufferState::Ready, BufferState::Draining);
        assert_eq!(record(&[(1, 0, 8, ready), (2, 8, 8, ready)]).check(), Ok(()));
        assert_eq!(problem(&record(&[(2, 7, 8, ready), (1, 0, 8, ready)])), Problem::Overlap);
        assert_eq!(problem(&record(&[(1, 0, 64, ready), (2, 8, 8, ready)])), Problem::Overlap);
        assert_eq!(record(&[(1, 0, 8, draining), (2, 0, 8, ready)]).check(), Ok(()));
        let mut elsewhere = record(&[(1, 0, 8, ready), (2, 0, 8, ready)]);
        elsewhere.buffers[1].location = "cuda:1".into();
        assert_eq!(elsewhere.check(), Ok(()));
        assert_eq!(problem(&record(&[(1, 0, 8, ready), (1, 8, 8, ready)])), Problem::Duplicate);
    }

    #[test]
    fn keys_are_none_or_one_per_device() {
        let mut record = record(&[(1, 0, 8, BufferState::Ready)]);
        record.devices = vec![Device::default(), Device::default()];
        assert_eq!(record.check(), Ok(()));
        record.buffers[0].keys = vec![1];
        assert_eq!(problem(&record), Problem::Keys { keys: 1, devices: 2 });
        record.buffers[0].keys = vec![1, u32::MAX];
        assert_eq!(record.check(), Ok(()));
    }

    #[test]
    fn names_transports_and_list_lengths_are_checked() {
        let mut bad = record(&[]);
        bad.group = "b/b".into();
        assert_eq!(bad.check().unwrap_err().field, 4);
        let mut bad = record(&[]);
        bad.transports = vec![Transport::default()];
        assert_eq!(problem(&bad), Problem::Missing);
        bad.transports = vec![Way::EpIbgda(EpIbgda::default()).into()];
        assert_eq!(bad.check().unwrap_err().part, Part::EpIbgda);
        bad.transports = vec![Way::Unknown { kind: "x".into(), raw: vec![] }.into(); TRANSPORTS_MAX + 1];
        assert_eq!(problem(&bad), Problem::TooMany { count: 65, max: 64 });
    }
}
