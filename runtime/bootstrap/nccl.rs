//! A rendezvous inside a communicator of NCCL: for ranks that have one already, and GPUs to hold it.
//!
//! An [`NcclBootstrap`] owns its share of the communicator and a stream. Blobs pass through device memory that lives as
//! long as the exchange; given up on, that memory stays until the stream is empty, because NCCL may still write it.
//!
//! An exchange is two of NCCL's: how long each rank's blob is and for what, then the blobs, padded to the longest.
//!
//! INVARIANT: nothing of what other ranks send is believed before its length and its key were compared.

use core::time::Duration;
use std::sync::Arc;

use ibex_nccl::Comm;
use parking_lot::Mutex;

use super::{BLOB_LEN_MAX, Bootstrap, BootstrapError};
use crate::gpu::{CudaGpu, DeviceMemory, Gpu, Stream};
use crate::ids::Rank;
use crate::time::Deadline;

/// Length, then hash of the key: 8 bytes each.
const HEADER_LEN: usize = 16;
/// What device memory is aligned to.
const ALIGN: usize = 256;

/// A rendezvous of the ranks of a communicator.
pub struct NcclBootstrap {
    comm: Mutex<Comm>,
    gpu: Arc<CudaGpu>,
    stream: Stream,
    rank: Rank,
    num_ranks: u32,
}

impl NcclBootstrap {
    /// Meets in `comm`, through memory of `gpu`, on which the communicator must be.
    ///
    /// # Errors
    /// What NCCL says of the communicator; more ranks than Ibex has numbers for.
    pub fn new(comm: Comm, gpu: &Arc<CudaGpu>) -> Result<Self, BootstrapError> {
        let (rank, num_ranks) = (comm.rank()?, comm.num_ranks()?);
        let Ok(number) = u16::try_from(rank) else {
            return Err(BootstrapError::TooLarge {
                what: "a rank",
                len: rank as usize,
                max: u16::MAX.into(),
            });
        };
        let (gpu, stream) = (Arc::clone(gpu), gpu.stream());
        Ok(Self { comm: Mutex::new(comm), gpu, stream, rank: Rank(number), num_ranks })
    }

    /// Gives `bytes`, which are as many on every rank, to all of them.
    fn gather(&self, key: &str, bytes: &[u8], deadline: &Deadline) -> Result<Vec<u8>, BootstrapError> {
        let waited = deadline.remaining();
        let (ours, all) = (self.alloc(bytes.len())?, self.alloc(bytes.len() * self.num_ranks as usize)?);
        self.gpu.write(ours.addr(), bytes)?;
        let done = self.gpu.event();
        let pointer = |memory: &DeviceMemory| memory.addr() as *mut std::ffi::c_void;
        let stream = self.gpu.raw_stream(&self.stream)?;
        #[expect(unsafe_code, reason = "device memory is handed to NCCL")]
        // SAFETY: both have the length that is said; a GPU keeps memory that was dropped until its streams are empty.
        unsafe {
            self.comm.lock().all_gather(pointer(&ours), pointer(&all), bytes.len(), stream)?;
        }
        self.gpu.record(&done, &self.stream)?;
        let mut failure = None;
        let came = self.gpu.wait_for(waited, &mut || match self.gpu.query(&done) {
            Ok(is_done) => is_done,
            Err(error) => {
                failure = Some(error);
                true
            }
        })?;
        if let Some(error) = failure {
            return Err(error.into());
        }
        if !came {
            // What NCCL has noticed says more than that nobody came.
            self.comm.lock().health()?;
            return Err(BootstrapError::Late { key: key.to_owned(), waited });
        }
        let mut gathered = vec![0; bytes.len() * self.num_ranks as usize];
        self.gpu.read(all.addr(), &mut gathered)?;
        Ok(gathered)
    }

    fn alloc(&self, len: usize) -> Result<DeviceMemory, BootstrapError> {
        Ok(self.gpu.alloc(len, ALIGN)?)
    }
}

/// A number for a key that is the same in every process: FNV-1a, as the standard library promises no stable one.
fn hash_of(key: &str) -> u64 {
    let mix = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    key.bytes().fold(0xcbf2_9ce4_8422_2325, mix)
}

impl Bootstrap for NcclBootstrap {
    fn rank(&self) -> Rank {
        self.rank
    }

    fn num_ranks(&self) -> u32 {
        self.num_ranks
    }

    fn all_gather(&self, key: &str, blob: &[u8], timeout: Duration) -> Result<Vec<Vec<u8>>, BootstrapError> {
        if blob.len() > BLOB_LEN_MAX {
            return Err(BootstrapError::TooLarge { what: "a blob", len: blob.len(), max: BLOB_LEN_MAX });
        }
        let deadline = Deadline::after(timeout);
        let mut header = [0; HEADER_LEN];
        header[..8].copy_from_slice(&(blob.len() as u64).to_le_bytes());
        header[8..].copy_from_slice(&hash_of(key).to_le_bytes());
        let headers = self.gather(key, &header, &deadline)?;
        let mut lens = Vec::new();
        for (from, theirs) in (0..).map(Rank).zip(headers.chunks_exact(HEADER_LEN)) {
            if theirs[8..] != header[8..] {
                return Err(BootstrapError::Differs { from, what: "exchange" });
            }
            let len = theirs.first_chunk().map_or(u64::MAX, |bytes| u64::from_le_bytes(*bytes));
            let len = usize::try_from(len).unwrap_or(usize::MAX);
            if len > BLOB_LEN_MAX {
                return Err(BootstrapError::TooLarge { what: "a blob", len, max: BLOB_LEN_MAX });
            }
            lens.push(len);
        }
        let room = lens.iter().copied().max().unwrap_or(0);
        if room == 0 {
            return Ok(lens.into_iter().map(|_| Vec::new()).collect());
        }
        let mut padded = blob.to_vec();
        padded.resize(room, 0);
        let all = self.gather(key, &padded, &deadline)?;
        Ok(all.chunks_exact(room).zip(lens).map(|(bytes, len)| bytes[..len].to_vec()).collect())
    }
}
