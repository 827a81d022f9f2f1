//! `trait Hca`: the control path of an RDMA device, and the plain values it deals in.
//!
//! The data path has no trait: it is work queue entries in registered memory and a doorbell store,
//! because that is all a GPU can do. What stands here is what a host does before and after.
//!
//! *Who owns what.* The caller owns all memory; a device holds keys to it between `register` (or
//! `create_umem`) and the matching release. The device owns doorbell pages; they stay mapped until
//! the device is dropped, so that a late doorbell is harmless.

#![expect(unsafe_code, reason = "declares the methods whose callers vouch for memory")]

use std::os::fd::RawFd;

use ibex_abi::types::{
    CqNum, Eqn, Gid, Iova, Lid, Lkey, Mac, MkeyIndex, PathMtu, Pd, QpNum, Rkey, UarIdx, UmemId,
};

use crate::bus::BusId;
use crate::error::{CommandError, HcaError};

/// The control path of one RDMA device function.
///
/// All methods may be called from any thread. Queues are created, modified and destroyed by PRM
/// mailboxes through [`exec`](Self::exec); [`crate::objects`] has typed builders for them.
pub trait Hca: Send + Sync {
    /// What the device can do, as QUERY_HCA_CAP said when it was opened.
    fn caps(&self) -> &HcaCaps;

    /// The port's link layer and addresses.
    fn port(&self) -> PortInfo;

    /// Allocates a protection domain.
    ///
    /// # Errors
    /// The device's refusal.
    fn alloc_pd(&self) -> Result<Pd, HcaError>;

    /// Gives a protection domain back.
    ///
    /// # Errors
    /// `RES_BUSY` while keys or queue pairs belong to it.
    fn dealloc_pd(&self, pd: Pd) -> Result<(), HcaError>;

    /// Registers memory for the data path; a WQE names byte `iova + n` to mean byte `n` of `mem`.
    ///
    /// # Errors
    /// An invalid range, unequal page offsets of `mem` and `iova`, or the device's refusal.
    ///
    /// # Safety
    /// Until [`deregister`](Self::deregister) returns, the memory stays mapped, and whoever else
    /// accesses it expects concurrent access by the device: the device reads and writes it
    /// whenever a WQE of this host, or a packet of a peer that knows the key, tells it to.
    unsafe fn register(
        &self,
        pd: Pd,
        mem: MemoryRegion,
        iova: Iova,
        access: Access,
    ) -> Result<Mkey, HcaError>;

    /// Revokes a key. When this returns the device no longer touches the memory through it.
    ///
    /// # Errors
    /// An unknown key.
    fn deregister(&self, key: Mkey) -> Result<(), HcaError>;

    /// Registers memory for rings, completion queues and doorbell records.
    ///
    /// # Errors
    /// An invalid range, or the device's refusal.
    ///
    /// # Safety
    /// As for [`register`](Self::register), until [`destroy_umem`](Self::destroy_umem) returns.
    unsafe fn create_umem(&self, mem: MemoryRegion) -> Result<Umem, HcaError>;

    /// Releases a umem.
    ///
    /// # Errors
    /// `RES_BUSY` while a queue lives in it.
    fn destroy_umem(&self, umem: Umem) -> Result<(), HcaError>;

    /// Allocates a doorbell register of its own.
    ///
    /// # Errors
    /// The device is out of pages.
    fn alloc_doorbell(&self) -> Result<DoorbellPage, HcaError>;

    /// Gives a doorbell page back; the register stays mapped while the device lives.
    ///
    /// # Errors
    /// `RES_BUSY` while a queue pair uses it.
    fn free_doorbell(&self, page: DoorbellPage) -> Result<(), HcaError>;

    /// The event queue of a completion vector, which a CQ must name.
    ///
    /// # Errors
    /// No such vector.
    fn eqn(&self, vector: u32) -> Result<Eqn, HcaError>;

    /// Finds the way to a remote port: what an address vector needs.
    ///
    /// # Errors
    /// The remote port has another link layer or an unusable address.
    fn resolve(&self, remote: &PortAddress) -> Result<Path, HcaError>;

    /// The partition key that queue pairs send with: its index in the port's table.
    fn pkey_index(&self) -> u16 {
        0
    }

    /// Executes one PRM command mailbox.
    ///
    /// # Errors
    /// The command's status, in the output's header as well when the output has room for one.
    fn exec(&self, input: &[u8], output: &mut [u8]) -> Result<(), CommandError>;

    /// Takes the oldest asynchronous event that has not been taken.
    fn poll_async_event(&self) -> Option<AsyncEvent>;

    /// Whether doorbells are registers of a device, which a GPU maps by another right than memory.
    fn doorbells_are_registers(&self) -> bool {
        false
    }

    /// Whether the device moves bytes itself, over PCI Express, and not by this process. Then it reaches memory of a
    /// GPU by dma-buf or by address, may keep queues there, and its writes must be ordered for that GPU.
    fn is_on_bus(&self) -> bool {
        false
    }

    /// WQEs of which a doorbell record spoke and no doorbell did, counted so far; `None` if the device cannot tell,
    /// as no real one can.
    fn unrung_wqes(&self) -> Option<u64> {
        None
    }
}

/// Limits and features of a device, from QUERY_HCA_CAP.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HcaCaps {
    /// Link layer of the port.
    pub link: LinkLayer,
    /// Layout version of CQEs; 1 carries the user index.
    pub cqe_version: u8,
    /// Log2 of the largest number of WQEBBs in a send queue.
    pub log_max_qp_sz: u8,
    /// Log2 of the smallest number of entries in a completion queue.
    pub log_min_cq_sz: u8,
    /// Log2 of the largest number of entries in a completion queue.
    pub log_max_cq_sz: u8,
    /// Largest send WQE, in bytes.
    pub max_wqe_sz_sq: u16,
    /// Largest receive WQE, in bytes.
    pub max_wqe_sz_rq: u16,
    /// Most payload bytes that one WQE carries inline after a remote address segment.
    pub max_inline: u16,
    /// Log2 of the largest message in bytes.
    pub log_max_msg: u8,
    /// Log2 of the most RDMA READs and atomics in flight as requester and as responder.
    pub log_max_rd_atomic: u8,
    /// Atomic operations are executed.
    pub atomic: bool,
    /// Entries of the port's GID table.
    pub gid_table_size: u16,
}

/// Link layer of a port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum LinkLayer {
    /// InfiniBand: ports are addressed by LID.
    Ib,
    /// Ethernet: ports are addressed by GID and MAC (RoCEv2).
    Roce,
}

/// A port as its own device describes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PortInfo {
    /// Port number, from 1.
    pub port_num: u8,
    /// Link layer.
    pub link: LinkLayer,
    /// Local identifier; zero on Ethernet.
    pub lid: Lid,
    /// Global identifier.
    pub gid: Gid,
    /// Position of `gid` in the port's table.
    pub gid_index: u8,
    /// Ethernet address; zero on InfiniBand.
    pub mac: Mac,
    /// Largest path MTU that the port carries.
    pub mtu: PathMtu,
}

impl PortInfo {
    /// What a peer must know to reach this port.
    #[must_use]
    pub const fn address(&self) -> PortAddress {
        PortAddress { link: self.link, lid: self.lid, gid: self.gid, mac: self.mac }
    }
}

/// The address of a port, as members exchange it out of band.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PortAddress {
    /// Link layer.
    pub link: LinkLayer,
    /// Local identifier; zero on Ethernet.
    pub lid: Lid,
    /// Global identifier.
    pub gid: Gid,
    /// Ethernet address; zero on InfiniBand.
    pub mac: Mac,
}

/// A resolved way to a remote port: the contents of an address vector.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Path {
    /// Local port number.
    pub port_num: u8,
    /// Service level, or Ethernet priority.
    pub sl: u8,
    /// Where the packets go.
    pub to: PathAddress,
    /// Largest MTU that both ends carry.
    pub mtu: PathMtu,
}

impl Path {
    /// The path for one queue pair: on Ethernet with a UDP source port that follows from both ends' numbers, so that
    /// queue pairs of one peer spread over the links between.
    #[must_use]
    pub fn of_queue_pair(mut self, qpn: QpNum, remote: QpNum) -> Self {
        if let PathAddress::Roce { udp_sport, .. } = &mut self.to {
            // Symmetric, so that both directions of a connection may take the same way.
            let product = u64::from(qpn.get()) * u64::from(remote.get());
            // CAST: 14 bits.
            let spread = (product ^ (product >> 14) ^ (product >> 28)) as u16 & 0x3fff;
            *udp_sport = UDP_SPORT_MIN | spread;
        }
        self
    }
}

/// First of the UDP source ports that RoCEv2 uses; they are the upper quarter.
pub const UDP_SPORT_MIN: u16 = 0xc000;

/// The part of a path that depends on the link layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PathAddress {
    /// InfiniBand, within a subnet.
    Ib {
        /// LID of the remote port.
        rlid: Lid,
    },
    /// RoCEv2.
    Roce {
        /// GID of the remote port.
        rgid: Gid,
        /// MAC of the next hop.
        rmac: Mac,
        /// Local GID to send from.
        sgid_index: u8,
        /// Hops that a packet may take.
        hop_limit: u8,
        /// Traffic class.
        tclass: u8,
        /// UDP source port, which spreads flows over links.
        udp_sport: u16,
    },
}

/// A piece of memory to register.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryRegion {
    /// Address of the first byte in the address space that `kind` names.
    pub addr: u64,
    /// Length in bytes.
    pub len: u64,
    /// Whose memory it is.
    pub kind: MemoryKind,
}

/// How a device reaches a [`MemoryRegion`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MemoryKind {
    /// Memory of this process; `addr` is a pointer.
    HostPtr,
    /// Memory behind a dma-buf (for the emulated device: any mappable descriptor).
    DmaBuf {
        /// The descriptor; the device keeps its own reference.
        fd: RawFd,
        /// Position of the first byte in the buffer.
        offset: u64,
    },
    /// Memory that this process reaches by copies only, at `addr` of a bus; only emulated devices reach it, and no
    /// queue of theirs lives in it.
    Copied {
        /// What copies.
        bus: BusId,
    },
}

impl MemoryRegion {
    /// Memory of this process.
    #[must_use]
    pub fn host<T>(start: *const T, len: u64) -> Self {
        Self { addr: start.expose_provenance() as u64, len, kind: MemoryKind::HostPtr }
    }
}

/// What may be done through a key; also what a QP allows its remote end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Access {
    /// The local device may write (READ results, receives).
    pub local_write: bool,
    /// The remote end may write.
    pub remote_write: bool,
    /// The remote end may read.
    pub remote_read: bool,
    /// The remote end may execute atomics.
    pub remote_atomic: bool,
}

impl Access {
    /// Everything.
    pub const ALL: Self =
        Self { local_write: true, remote_write: true, remote_read: true, remote_atomic: true };
    /// Local reads only: a source of writes and sends.
    pub const LOCAL_READ: Self =
        Self { local_write: false, remote_write: false, remote_read: false, remote_atomic: false };
    /// Local access, both ways.
    pub const LOCAL: Self = Self { local_write: true, ..Self::LOCAL_READ };
}

/// A memory key, with what is needed to name bytes of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mkey {
    /// The object.
    pub index: MkeyIndex,
    /// Key for local use in WQEs.
    pub lkey: Lkey,
    /// Key for the remote end.
    pub rkey: Rkey,
    /// Address of the first byte, as WQEs name it.
    pub iova: Iova,
    /// Length in bytes.
    pub len: u64,
}

/// Memory registered for queues.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Umem {
    /// Its number in mailboxes.
    pub id: UmemId,
    /// Length in bytes.
    pub len: u64,
}

/// A doorbell register.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DoorbellPage {
    /// The page's index in mailboxes.
    pub uar: UarIdx,
    /// Address of the register: 8 bytes, 8-byte aligned, written by one store.
    pub register: u64,
}

/// Something the device reports on its own account.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum AsyncEvent {
    /// The CQ overflowed (or met a bad entry) and takes no more completions.
    #[error("completion queue {:#x} failed", .cqn.get())]
    CqError {
        /// Which.
        cqn: CqNum,
    },
    /// The QP failed on a local work queue error that no CQE could tell.
    #[error("queue pair {:#x} failed", .qpn.get())]
    QpFatal {
        /// Which.
        qpn: QpNum,
    },
    /// The remote end asked for something malformed; the QP is in ERR.
    #[error("the remote end of queue pair {:#x} asked for something malformed", .qpn.get())]
    QpRequestError {
        /// Which.
        qpn: QpNum,
    },
    /// The remote end violated access rights; the QP is in ERR.
    #[error("the remote end of queue pair {:#x} violated access rights", .qpn.get())]
    QpAccessError {
        /// Which.
        qpn: QpNum,
    },
    /// A completion that asked for an event (`ce` = 3) was written.
    #[error("completion queue {:#x} has a completion that was asked for", .cqn.get())]
    Completion {
        /// Which.
        cqn: CqNum,
    },
    /// A port carries packets again.
    #[error("port {port_num} is up")]
    PortUp {
        /// Which, from 1.
        port_num: u8,
    },
    /// A port carries no packets any more.
    #[error("port {port_num} is down")]
    PortDown {
        /// Which, from 1.
        port_num: u8,
    },
    /// A port's LID or GIDs changed: what peers know of it may be wrong.
    #[error("the addresses of port {port_num} changed")]
    AddressChanged {
        /// Which, from 1.
        port_num: u8,
    },
    /// The device is gone, or failed for good.
    #[error("the device is gone")]
    DeviceRemoved,
}
