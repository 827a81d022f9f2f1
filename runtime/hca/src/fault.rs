//! Scripted failures around any device.
//!
//! [`FaultHca`] is a device made of another: calls go through, except those that its script names. It is
//! composed, never a copy, so what is tested with faults is what runs without them.
//!
//! *Who owns what.* The wrapper owns the script and a shared handle of the device; nothing else.
//!
//! INVARIANT: a refused call does not reach the device; a call whose reply is lost does.
#![expect(unsafe_code, reason = "passes the unsafe methods of the trait on")]

use std::collections::VecDeque;
use std::sync::Arc;

use ibex_abi::prm::{self, Op, Status};
use ibex_abi::types::{Eqn, Iova, Pd};
use parking_lot::Mutex;

use crate::emulated::CommandSyndrome;
use crate::{
    Access, AsyncEvent, CommandError, DoorbellPage, Hca, HcaCaps, HcaError, MemoryRegion, Mkey, Path,
    PortAddress, PortInfo, Umem,
};

/// Most faults that wait in a script, and most events that wait to be reported.
pub const FAULTS_MAX: usize = 1024;

/// What happens to the command that a fault strikes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effect {
    /// The device does not see it; the caller gets this status.
    Refuse(Status),
    /// The device executes it; the caller gets this status all the same.
    LoseReply(Status),
}

/// One scripted failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fault {
    /// The command it strikes; `None` strikes any.
    pub op: Option<Op>,
    /// Matching commands that pass first.
    pub skip: u32,
    /// What it does.
    pub effect: Effect,
}

impl Fault {
    /// The next `op` is refused with `status`.
    #[must_use]
    pub const fn refuse(op: Op, status: Status) -> Self {
        Self { op: Some(op), skip: 0, effect: Effect::Refuse(status) }
    }
}

/// A device with scripted failures.
#[derive(Debug)]
pub struct FaultHca<H> {
    inner: Arc<H>,
    script: Mutex<Vec<Fault>>,
    /// Events that the device is made to report.
    events: Mutex<VecDeque<AsyncEvent>>,
}

impl<H: Hca> FaultHca<H> {
    /// Wraps a device; nothing fails yet.
    #[must_use]
    pub fn new(inner: Arc<H>) -> Arc<Self> {
        Arc::new(Self { inner, script: Mutex::default(), events: Mutex::default() })
    }

    /// The device inside.
    #[must_use]
    pub const fn inner(&self) -> &Arc<H> {
        &self.inner
    }

    /// Adds a failure to the script; false if the script is full.
    pub fn inject(&self, fault: Fault) -> bool {
        let mut script = self.script.lock();
        let room = script.len() < FAULTS_MAX;
        if room {
            script.push(fault);
        }
        room
    }

    /// Has the device report an event, before those of its own; false if [`FAULTS_MAX`] wait already.
    pub fn report(&self, event: AsyncEvent) -> bool {
        let mut events = self.events.lock();
        let room = events.len() < FAULTS_MAX;
        if room {
            events.push_back(event);
        }
        room
    }

    /// Failures that have not struck yet.
    #[must_use]
    pub fn pending(&self) -> usize {
        self.script.lock().len()
    }

    /// Forgets the rest of the script.
    pub fn clear(&self) {
        self.script.lock().clear();
    }

    /// The effect on this command, if a fault strikes it; the fault is then spent.
    fn strike(&self, op: Option<Op>) -> Option<Effect> {
        let mut script = self.script.lock();
        let mut struck = None;
        for (idx, fault) in script.iter_mut().enumerate() {
            if fault.op.is_some() && fault.op != op {
                continue;
            }
            match fault.skip.checked_sub(1) {
                Some(left) => fault.skip = left,
                None => {
                    struck = struck.or(Some(idx));
                }
            }
        }
        struck.map(|idx| script.remove(idx).effect)
    }

    /// Runs a typed call that stands for the command `op`.
    fn typed<T>(&self, op: Op, call: impl FnOnce(&H) -> Result<T, HcaError>) -> Result<T, HcaError> {
        match self.strike(Some(op)) {
            None => call(&self.inner),
            Some(Effect::Refuse(status)) => Err(injected(op.code(), status).into()),
            Some(Effect::LoseReply(status)) => {
                // The object exists, and nobody knows its name: that is the point.
                let _ = call(&self.inner)?;
                Err(injected(op.code(), status).into())
            }
        }
    }
}

fn injected(opcode: u16, status: Status) -> CommandError {
    CommandError::new(opcode, status, CommandSyndrome::Injected.code(), None)
}

impl<H: Hca> Hca for FaultHca<H> {
    fn caps(&self) -> &HcaCaps {
        self.inner.caps()
    }

    fn port(&self) -> PortInfo {
        self.inner.port()
    }

    fn alloc_pd(&self) -> Result<Pd, HcaError> {
        self.typed(Op::AllocPd, H::alloc_pd)
    }

    fn dealloc_pd(&self, pd: Pd) -> Result<(), HcaError> {
        self.typed(Op::DeallocPd, |inner| inner.dealloc_pd(pd))
    }

    unsafe fn register(
        &self,
        pd: Pd,
        mem: MemoryRegion,
        iova: Iova,
        access: Access,
    ) -> Result<Mkey, HcaError> {
        // A key whose name is lost could never be revoked, so a lost reply undoes the registration.
        let effect = self.strike(Some(Op::CreateMkey));
        if let Some(Effect::Refuse(status)) = effect {
            return Err(injected(Op::CreateMkey.code(), status).into());
        }
        // SAFETY: the caller's contract is the same.
        let key = unsafe { self.inner.register(pd, mem, iova, access) }?;
        match effect {
            Some(Effect::LoseReply(status)) => {
                self.inner.deregister(key)?;
                Err(injected(Op::CreateMkey.code(), status).into())
            }
            _ => Ok(key),
        }
    }

    fn deregister(&self, key: Mkey) -> Result<(), HcaError> {
        self.typed(Op::DestroyMkey, |inner| inner.deregister(key))
    }

    unsafe fn create_umem(&self, mem: MemoryRegion) -> Result<Umem, HcaError> {
        let effect = self.strike(Some(Op::CreateUmem));
        if let Some(Effect::Refuse(status)) = effect {
            return Err(injected(Op::CreateUmem.code(), status).into());
        }
        // SAFETY: the caller's contract is the same.
        let umem = unsafe { self.inner.create_umem(mem) }?;
        match effect {
            Some(Effect::LoseReply(status)) => {
                self.inner.destroy_umem(umem)?;
                Err(injected(Op::CreateUmem.code(), status).into())
            }
            _ => Ok(umem),
        }
    }

    fn destroy_umem(&self, umem: Umem) -> Result<(), HcaError> {
        self.typed(Op::DestroyUmem, |inner| inner.destroy_umem(umem))
    }

    fn alloc_doorbell(&self) -> Result<DoorbellPage, HcaError> {
        self.typed(Op::AllocUar, H::alloc_doorbell)
    }

    fn free_doorbell(&self, page: DoorbellPage) -> Result<(), HcaError> {
        self.typed(Op::DeallocUar, |inner| inner.free_doorbell(page))
    }

    fn eqn(&self, vector: u32) -> Result<Eqn, HcaError> {
        self.inner.eqn(vector)
    }

    fn resolve(&self, remote: &PortAddress) -> Result<Path, HcaError> {
        self.inner.resolve(remote)
    }

    fn pkey_index(&self) -> u16 {
        self.inner.pkey_index()
    }

    fn exec(&self, input: &[u8], output: &mut [u8]) -> Result<(), CommandError> {
        // CAST: a 16-bit field.
        let opcode = prm::try_get(input, prm::cmd_in::OPCODE).unwrap_or(0) as u16;
        let Some(effect) = self.strike(Op::from_code(opcode).ok()) else {
            return self.inner.exec(input, output);
        };
        let status = match effect {
            Effect::Refuse(status) => status,
            Effect::LoseReply(status) => {
                self.inner.exec(input, output)?;
                status
            }
        };
        output.fill(0);
        let error = injected(opcode, status);
        if output.len() >= 8 {
            prm::set(output, prm::cmd_out::STATUS, status.code().into());
            prm::set(output, prm::cmd_out::SYNDROME, error.syndrome.into());
        }
        Err(error)
    }

    fn poll_async_event(&self) -> Option<AsyncEvent> {
        let reported = self.events.lock().pop_front();
        reported.or_else(|| self.inner.poll_async_event())
    }

    fn doorbells_are_registers(&self) -> bool {
        self.inner.doorbells_are_registers()
    }

    fn is_on_bus(&self) -> bool {
        self.inner.is_on_bus()
    }

    fn unrung_wqes(&self) -> Option<u64> {
        self.inner.unrung_wqes()
    }
}
