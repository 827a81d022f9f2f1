//! Memory registered for queues, and who holds it.
//!
//! *Who owns what.* The driver owns the bytes. A [`Umem`] is a granted range; every queue carved from it
//! keeps a [`UmemHold`], and a umem is released only when nobody holds it.

use std::sync::Arc;

use super::memory::Span;

/// A registered range.
#[derive(Debug)]
pub(super) struct Umem {
    pub(super) memory: Span,
}

/// Keeps a umem from being released.
#[derive(Debug, Clone)]
pub(super) struct UmemHold {
    _umem: Arc<Umem>,
}

/// The table's own reference to a umem.
#[derive(Debug)]
pub(super) struct UmemOwner(Arc<Umem>);

impl UmemOwner {
    pub(super) fn new(memory: Span) -> Self {
        Self(Arc::new(Umem { memory }))
    }

    /// The bytes `[offset, offset + len)`, held for a queue; `None` if they are not all inside.
    pub(super) fn hold(&self, offset: u64, len: u64) -> Option<(Span, UmemHold)> {
        let span = self.0.memory.slice(offset, len)?;
        Some((span, UmemHold { _umem: Arc::clone(&self.0) }))
    }

    /// Holds the umem for a piece of its memory; `None` if the piece is not all inside.
    pub(super) fn hold_span(&self, piece: Span) -> Option<UmemHold> {
        let offset = piece.addr().checked_sub(self.0.memory.addr())?;
        self.hold(offset, piece.len()).map(|(_, hold)| hold)
    }

    /// Whether a queue lives in it.
    pub(super) fn is_held(&self) -> bool {
        Arc::strong_count(&self.0) > 1
    }
}
