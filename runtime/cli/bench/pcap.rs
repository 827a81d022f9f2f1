//! `--pcap` of a run in one process: what its queue pairs would put on a wire, in a file.
//!
//! A [`Pcap`] owns the file for the length of a run. Ranks with processes of their own capture by
//! [`MemberOptions`](ibex::session::MemberOptions).

use std::path::{Path, PathBuf};
use std::sync::Arc;

use ibex::World;
use ibex::time::unix_ns;
use ibex_hca::emulated::Capture;
use ibex_hca::{HcaError, Nanos};

use crate::cli::CliError;

/// A capture under way.
pub(super) struct Pcap {
    capture: Arc<Capture>,
    path: PathBuf,
}

impl Pcap {
    /// Starts capturing what the devices of `world` send, where a file was given.
    ///
    /// # Errors
    /// A file that cannot be written.
    pub(super) fn start(
        path: Option<&Path>,
        world: &World,
        is_simulation: bool,
    ) -> Result<Option<Self>, CliError> {
        let Some(path) = path else { return Ok(None) };
        // Virtual time begins whenever one likes; the pool's real time becomes the time of day.
        let epoch = if is_simulation { 0 } else { unix_ns().saturating_sub(world.pool().now_ns()) };
        let capture = Capture::create(path, Nanos(epoch)).map_err(|error| refused(path, error))?;
        let capture = Arc::new(capture);
        world.fabric().capture_to(&capture);
        Ok(Some(Self { capture, path: path.into() }))
    }

    /// Ends the capture and says how much there is.
    ///
    /// # Errors
    /// A file that could not be written to its end.
    pub(super) fn end(self) -> Result<(), CliError> {
        let packets = self.capture.flush().map_err(|error| refused(&self.path, error))?;
        eprintln!("ibex: captured {packets} packets");
        Ok(())
    }
}

fn refused(path: &Path, error: HcaError) -> CliError {
    let source = match error {
        HcaError::Os { errno, .. } => std::io::Error::from_raw_os_error(errno),
        other => std::io::Error::other(other),
    };
    CliError::Output { path: path.into(), source }
}
