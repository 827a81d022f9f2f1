//! Every bound of this crate, in one place: what is larger is refused, with the bound in the refusal.

use core::time::Duration;

/// Bytes of one encoded record.
pub const RECORD_LEN_MAX: usize = 64 << 10;
/// Bytes of one shared cell.
pub const CELL_LEN_MAX: usize = 64 << 10;
/// Bytes of one part of a name (cluster, group or name).
pub const NAME_PART_LEN_MAX: usize = 63;
/// Names in one batch.
pub const BATCH_LEN_MAX: usize = 4096;
/// Entries in one page of a listing.
pub const PAGE_LEN_MAX: usize = 1024;
/// Names (and cells) that one store holds.
pub const NAMES_MAX: usize = 1 << 20;
/// Readers registered on one name.
pub const READERS_MAX: usize = 4096;
/// Changes that a store remembers for watches that resume.
pub const HISTORY_LEN_MAX: usize = 4096;
/// Events between a store and one watcher; a slower watcher stops the sender, not the store.
pub const WATCH_QUEUE_LEN: usize = 64;
/// Bytes of one message between client and server: a full batch of ordinary records.
pub const MESSAGE_LEN_MAX: usize = 64 << 20;
/// Bytes of one value that lies in several cells: as much as a client of ModelExpress sends.
pub const PARCEL_LEN_MAX: usize = 100 << 20;
/// Bytes of one value under Mooncake's HTTP keys.
pub const HTTP_VALUE_LEN_MAX: usize = 4 << 20;
/// Shortest lease: below this the trip to a store is a large part of it.
pub const TTL_MIN: Duration = Duration::from_millis(50);
/// Longest lease.
pub const TTL_MAX: Duration = Duration::from_secs(24 * 3600);

/// Devices in one record.
pub const DEVICES_MAX: usize = 64;
/// Transports in one record.
pub const TRANSPORTS_MAX: usize = 64;
/// Buffers in one record.
pub const BUFFERS_MAX: usize = 1024;
/// Manifests in one record.
pub const MANIFESTS_MAX: usize = 64;
/// Queue-pair numbers in one transport.
pub const QPNS_MAX: usize = 8192;
/// Extra parameters of a source identity.
pub const EXTRAS_MAX: usize = 64;
/// Bytes of one short text: a host, a location, a device name.
pub const TEXT_LEN_MAX: usize = 1024;
/// Bytes of one opaque blob: agent metadata, an IPC handle, a digest.
pub const BLOB_LEN_MAX: usize = 48 << 10;
