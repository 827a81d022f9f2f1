//! What one rank in a process of its own stands on: device, fabric's end, GPU (made of the CPU, or given), session,
//! attendant.
//!
//! A [`Node`] owns all of it. How ranks find each other is not its business: [`Member`](super::Member) and
//! [`ElasticMember`](super::ElasticMember) know that.
//!
//! A thread of its own, the *attendant*, sends the signs of life and serves the device while no kernel runs: peers may
//! still be sending. While kernels run their worker steps the device, and the attendant stays out of the way; where a
//! GPU runs them, a stepper plays the worker.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::Arc;

use ibex_hca::emulated::{Capture, EmulatedConfig, EmulatedHca, Fabric, ShmConfig, UdpConfig};
use ibex_hca::{HcaError, LinkLayer, Nanos};

use super::attendant::{Attendant, Lateness};
use super::stepper::Stepper;
use super::{MemberFabric, MemberOptions, Session};
use crate::bootstrap::{Advertised, BootstrapError};
use crate::config::{Link, ValidConfig};
use crate::error::{ConfigError, Error, Limit};
use crate::gpu::HostGpu;
use crate::gpu::pool::{Pool, PoolConfig, Progress, Progressed};
use crate::ids::Rank;
use crate::recovery::HostId;
use crate::time::unix_ns;

/// Steps the device as a worker would, by the same clock.
struct Kernels {
    progress: Arc<dyn Progress>,
    pool: Arc<Pool>,
}

impl Progress for Kernels {
    fn progress(&self, worker: u32, _now_ns: u64, random: u64) -> Progressed {
        self.progress.progress(worker, self.pool.now_ns(), random)
    }
}

/// See the module documentation.
pub(super) struct Node {
    // In this order: queue pairs go while the device runs, the device while its fabric does.
    session: Arc<Session>,
    _stepper: Option<Stepper>,
    attendant: Attendant,
    device: Arc<EmulatedHca>,
    fabric: Arc<Fabric>,
    pool: Arc<Pool>,
    capture: Option<Arc<Capture>>,
}

impl Node {
    /// Builds everything up to a session without queue pairs. `meet` runs once the port exists, before the session.
    ///
    /// # Errors
    /// What a part, or `meet`, refused. Nothing stays behind.
    pub(super) fn new(
        config: &ValidConfig,
        rank: Rank,
        options: &MemberOptions,
        advertised: Option<Advertised>,
        meet: impl FnOnce(&Fabric, &EmulatedHca) -> Result<(), Error>,
    ) -> Result<Self, Error> {
        let fabric = make_fabric(options, rank, config.num_ranks, advertised)?;
        let link = match config.link {
            Link::Ib => LinkLayer::Ib,
            Link::Roce => LinkLayer::Roce,
        };
        let device_config =
            EmulatedConfig { link, doorbells: options.doorbells, ..EmulatedConfig::default() };
        let device = EmulatedHca::new(Arc::clone(&fabric), device_config)?;
        let given = options.gpus.only()?;
        let attendant = Attendant::new(&device, &fabric, config.detect_ms);
        let progress: Arc<dyn Progress> = attendant.progress();
        let pool_config = PoolConfig::real_time(options.workers).with_progress(progress);
        let pool = Arc::new(Pool::new(pool_config).map_err(crate::gpu::GpuError::from)?);
        let capture = options.capture.as_deref().map(|path| capture(path, &fabric, &pool)).transpose()?;
        meet(&fabric, &device)?;
        let kernels = Kernels { progress: attendant.progress(), pool: Arc::clone(&pool) };
        let stepper = given.is_some().then(|| Stepper::start(Arc::new(kernels))).transpose()?;
        let gpu = given.unwrap_or_else(|| Arc::new(HostGpu::shared(Arc::clone(&pool), 0)));
        let refused =
            ConfigError { field: "devices", value: 1_u32.into(), limit: Limit::Range { min: 0, max: 0 } };
        let hca = options.devices.around(rank, &device).ok_or(refused)?;
        let session = Arc::new(Session::new(config, rank, gpu, hca)?);
        let attendant = attendant.start(&session, &pool)?;
        Ok(Self { session, _stepper: stepper, attendant, device, fabric, pool, capture })
    }

    pub(super) fn session(&self) -> &Arc<Session> {
        &self.session
    }

    pub(super) fn device(&self) -> &Arc<EmulatedHca> {
        &self.device
    }

    pub(super) fn fabric(&self) -> &Arc<Fabric> {
        &self.fabric
    }

    pub(super) fn pool(&self) -> &Arc<Pool> {
        &self.pool
    }

    /// Completes the capture so far; how many packets it has.
    pub(super) fn flush_capture(&self) -> Result<Option<u64>, Error> {
        Ok(self.capture.as_ref().map(|capture| capture.flush()).transpose()?)
    }

    /// How late this process was since this was last asked.
    pub(super) fn take_lateness(&self) -> Lateness {
        self.attendant.take_lateness()
    }

    /// Stops or resumes the signs of life.
    pub(super) fn set_silent(&self, silent: bool) {
        self.attendant.set_silent(silent);
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        // Otherwise a sign of life under way could be the last to hold the session, and drop it in the wrong place.
        self.attendant.forget_session();
    }
}

fn make_fabric(
    options: &MemberOptions,
    rank: Rank,
    num_ranks: u32,
    advertised: Option<Advertised>,
) -> Result<Arc<Fabric>, HcaError> {
    match options.fabric {
        MemberFabric::Shm => {
            // CAST: at most 512 ranks.
            let peers_max = num_ranks as u16;
            Fabric::shm(ShmConfig { first_port: rank.0, peers_max, ..ShmConfig::default() })
        }
        MemberFabric::Udp => {
            let ip = advertised.map_or(IpAddr::V4(Ipv4Addr::LOCALHOST), |a| a.address);
            let config = UdpConfig {
                node: rank.0,
                mtu: options.mtu,
                faults: options.faults.clone(),
                ..UdpConfig::new(ip)
            };
            match Fabric::udp(config.clone()) {
                // Another job has RoCEv2's port; peers are told which one it is instead.
                Err(HcaError::Os { errno: libc::EADDRINUSE, .. }) => {
                    Fabric::udp(UdpConfig { bind: SocketAddr::new(ip, 0), ..config })
                }
                made => made,
            }
        }
    }
}

/// Has what the fabric's ports send and receive written to a file, stamped with the time of day.
fn capture(path: &Path, fabric: &Fabric, pool: &Pool) -> Result<Arc<Capture>, HcaError> {
    let epoch = Nanos(unix_ns().saturating_sub(pool.now_ns()));
    let capture = Arc::new(Capture::create(path, epoch)?);
    fabric.capture_to(&capture);
    Ok(capture)
}

/// Refuses a rank whose memory is out of reach.
pub(super) fn check_host(from: Rank, host: &[u8]) -> Result<(), BootstrapError> {
    let host = host.try_into().map_err(|_| BootstrapError::Blob { from, what: "a host" })?;
    let (theirs, ours) = (HostId::from_bytes(host), HostId::current());
    if theirs == ours { Ok(()) } else { Err(BootstrapError::OtherHost { from, theirs, ours }) }
}

/// Byte strings behind each other, each behind its length.
pub(super) mod parts {
    /// Joins them.
    pub(in crate::session) fn join(parts: &[Vec<u8>]) -> Vec<u8> {
        let mut blob = Vec::new();
        for part in parts {
            // CAST: the rendezvous takes at most a mebibyte in all.
            blob.extend((part.len() as u32).to_le_bytes());
            blob.extend(part);
        }
        blob
    }

    /// Splits what a peer joined; none if it is something else.
    pub(in crate::session) fn split(mut blob: &[u8]) -> Option<Vec<Vec<u8>>> {
        let mut parts = Vec::new();
        while !blob.is_empty() {
            let (len, rest) = blob.split_first_chunk::<4>()?;
            let (part, rest) = rest.split_at_checked(u32::from_le_bytes(*len) as usize)?;
            parts.push(part.to_vec());
            blob = rest;
        }
        Some(parts)
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        #[test]
        fn parts_survive_and_broken_ones_are_found() {
            let parts = vec![vec![1, 2, 3], vec![], vec![4]];
            let blob = join(&parts);
            assert_eq!(split(&blob), Some(parts));
            assert_eq!(split(&[]), Some(vec![]));
            assert_eq!(split(&blob[..blob.len() - 1]), None);
            assert_eq!(split(&[0xff; 6]), None);
        }
    }
}
