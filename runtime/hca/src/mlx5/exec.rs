//! Commands: PRM mailboxes to the device, through DevX.
//!
//! DevX ties every object to the process: it hands out a handle when a command creates one, and wants it back with
//! every command that names the object. So a mailbox is first matched with the table, then sent.
//!
//! INVARIANT: no command goes to the device that the device would have to refuse for its length or for an object that
//! does not exist; the answers are the same, without asking.

use std::io;

use ibex_abi::prm::{self, Op, Status};
use ibex_abi::types::{QpState, UarIdx};

use super::Mlx5Hca;
use super::devices::answered;
use super::error::{refuse, refused};
use super::table::{Queue, QueueKind, kind_of, released};
use crate::{CommandError, DoorbellPage, Hca, HcaError, Mkey, Umem};

/// How DevX takes a command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Route {
    Create(QueueKind),
    Destroy(QueueKind),
    Modify(QueueKind),
    Query(QueueKind),
    /// One that names no object.
    General,
    /// One for which the libraries have a call of their own.
    Typed,
    /// One that the kernel keeps to itself.
    Kernel,
}

const fn route(op: Op) -> Route {
    match op {
        Op::CreateCq => Route::Create(QueueKind::Cq),
        Op::CreateQp => Route::Create(QueueKind::Qp),
        Op::DestroyCq => Route::Destroy(QueueKind::Cq),
        Op::DestroyQp => Route::Destroy(QueueKind::Qp),
        Op::QueryQp => Route::Query(QueueKind::Qp),
        Op::QueryHcaCap | Op::QueryIssi | Op::QueryHcaVportContext | Op::QueryRoceAddress => Route::General,
        Op::AllocPd | Op::DeallocPd | Op::AllocUar | Op::DeallocUar | Op::DestroyMkey | Op::DestroyUmem => {
            Route::Typed
        }
        op => match kind_of(op) {
            Some(kind) => Route::Modify(kind),
            None => Route::Kernel,
        },
    }
}

impl Mlx5Hca {
    /// Executes one mailbox.
    pub(super) fn command(&self, input: &[u8], output: &mut [u8]) -> Result<(), CommandError> {
        // CAST: a 16-bit field.
        let opcode = prm::try_get(input, prm::cmd_in::OPCODE).unwrap_or(0) as u16;
        let Ok(op) = Op::from_code(opcode) else { return Err(refuse(opcode, Status::BadOp, output)) };
        if input.len() < op.input_len_min() {
            return Err(refuse(opcode, Status::BadInpLen, output));
        }
        if output.len() < op.output_len_min() {
            return Err(refuse(opcode, Status::BadOutpLen, output));
        }
        match route(op) {
            Route::Create(kind) => self.create(op, kind, input, output),
            Route::Destroy(kind) => self.destroy(op, kind, input, output),
            Route::Modify(kind) | Route::Query(kind) => self.name_queue(op, kind, input, output),
            Route::General => self.general(op, input, output),
            Route::Typed => self.typed(op, input, output),
            Route::Kernel => Err(refuse(opcode, Status::BadOp, output)),
        }
    }

    fn create(&self, op: Op, kind: QueueKind, input: &[u8], output: &mut [u8]) -> Result<(), CommandError> {
        let mut table = self.table.lock();
        let (library, context) = (self.opened.library(), self.opened.context());
        // SAFETY: an open context; the mailboxes are read and written within their lengths, during the call.
        let handle = unsafe {
            let (from, into) = (input.as_ptr().cast(), output.as_mut_ptr().cast());
            library.mlx5dv_devx_obj_create(context, from, input.len(), into, output.len())
        };
        if handle.is_null() {
            return Err(refused(op.code(), &io::Error::last_os_error(), output));
        }
        // CAST: a 24-bit field, in the same place of both replies.
        let number = prm::get(output, prm::create_qp_out::QPN) as u32;
        // Under the lock: nobody destroys the object meanwhile.
        self.events.subscribe(kind, number, handle);
        table.queues.insert((kind, number), Queue::new(kind, handle, input));
        Ok(())
    }

    fn destroy(&self, op: Op, kind: QueueKind, input: &[u8], output: &mut [u8]) -> Result<(), CommandError> {
        let number = number_in(input);
        let mut table = self.table.lock();
        if !table.queues.contains_key(&(kind, number)) {
            return Err(refuse(op.code(), Status::BadRes, output));
        }
        if kind == QueueKind::Cq && table.uses_cq(number) {
            return Err(refuse(op.code(), Status::ResBusy, output));
        }
        output.fill(0);
        let is_gone = || self.events.is_gone(&self.opened);
        let answer = table.destroy_queue(self.opened.library(), &is_gone, (kind, number));
        answer.map_err(|error| refused(op.code(), &error, output))
    }

    /// A command that names a queue: changes its state, or asks for it.
    fn name_queue(
        &self,
        op: Op,
        kind: QueueKind,
        input: &[u8],
        output: &mut [u8],
    ) -> Result<(), CommandError> {
        let number = number_in(input);
        let answer = {
            let table = self.table.lock();
            let Some(queue) = table.queues.get(&(kind, number)) else {
                return Err(refuse(op.code(), Status::BadRes, output));
            };
            let library = self.opened.library();
            let (from, into) = (input.as_ptr().cast(), output.as_mut_ptr().cast());
            // SAFETY: a live object, kept so by the lock; the mailboxes are read and written within their lengths,
            // during the call.
            unsafe {
                match route(op) {
                    Route::Query(_) => {
                        library.mlx5dv_devx_obj_query(queue.handle, from, input.len(), into, output.len())
                    }
                    _ => library.mlx5dv_devx_obj_modify(queue.handle, from, input.len(), into, output.len()),
                }
            }
        };
        // What is to be stopped on a device that is gone has stopped.
        let stops = matches!(op, Op::ToErrQp | Op::ToRstQp);
        let is_gone = || stops && self.events.is_gone(&self.opened);
        released(answer, &is_gone).map_err(|error| {
            let refusal = refused(op.code(), &error, output);
            let qp_state = (op != Op::QueryQp).then(|| self.state_of(number)).flatten();
            CommandError { qp_state, ..refusal }
        })
    }

    /// A queue pair's state, to say in which one a transition was refused.
    fn state_of(&self, qpn: u32) -> Option<QpState> {
        use prm::{qpc, query_qp_in as cmd, query_qp_out as out};
        let (mut input, mut output) = ([0; cmd::LEN], [0; out::LEN]);
        prm::set(&mut input, cmd::OPCODE, Op::QueryQp.code().into());
        prm::set(&mut input, cmd::QPN, qpn.into());
        self.name_queue(Op::QueryQp, QueueKind::Qp, &input, &mut output).ok()?;
        QpState::from_code(prm::get(prm::part(&output, out::QPC), qpc::STATE))
    }

    fn general(&self, op: Op, input: &[u8], output: &mut [u8]) -> Result<(), CommandError> {
        let (library, context) = (self.opened.library(), self.opened.context());
        // SAFETY: an open context; the mailboxes are read and written within their lengths, during the call.
        let answer = unsafe {
            let (from, into) = (input.as_ptr().cast(), output.as_mut_ptr().cast());
            library.mlx5dv_devx_general_cmd(context, from, input.len(), into, output.len())
        };
        answered(answer).map_err(|error| refused(op.code(), &error, output))
    }

    /// Commands that have a method in [`Hca`], for callers that send a mailbox all the same.
    fn typed(&self, op: Op, input: &[u8], output: &mut [u8]) -> Result<(), CommandError> {
        let number = number_in(input);
        output.fill(0);
        let made = match op {
            Op::AllocPd => self.alloc_pd().map(|pd| Some(pd.get())),
            Op::AllocUar => self.alloc_doorbell().map(|page| Some(page.uar.get())),
            Op::DeallocPd => self.dealloc_pd(ibex_abi::types::Pd::new(number)).map(|()| None),
            Op::DeallocUar => {
                self.free_doorbell(DoorbellPage { uar: UarIdx::new(number), register: 0 }).map(|()| None)
            }
            Op::DestroyMkey => self.deregister(key_named(number)).map(|()| None),
            _ => self.destroy_umem(Umem { id: ibex_abi::types::UmemId(number), len: 0 }).map(|()| None),
        };
        match made {
            Ok(None) => Ok(()),
            Ok(Some(number)) => {
                prm::set(output, prm::alloc_pd_out::PD, number.into());
                Ok(())
            }
            Err(HcaError::Command(refusal)) => Err(refuse(op.code(), refusal.status, output)),
            Err(HcaError::Os { errno, .. }) => {
                Err(refused(op.code(), &io::Error::from_raw_os_error(errno), output))
            }
            Err(_) => Err(refuse(op.code(), Status::IntErr, output)),
        }
    }
}

/// The object that a command names: 24 bits, in the same place of all of them.
fn number_in(input: &[u8]) -> u32 {
    // CAST: a 24-bit field.
    prm::get(input, prm::qp_2err_in::QPN) as u32
}

/// A key of which only the number is known.
fn key_named(number: u32) -> Mkey {
    use ibex_abi::types::{Iova, Lkey, MkeyIndex, Rkey};
    Mkey { index: MkeyIndex::new(number), lkey: Lkey(0), rkey: Rkey(0), iova: Iova(0), len: 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_command_has_one_way() {
        for &op in Op::ALL {
            let is_queue = kind_of(op).is_some();
            let by_object = matches!(
                route(op),
                Route::Create(_) | Route::Destroy(_) | Route::Modify(_) | Route::Query(_)
            );
            assert_eq!(is_queue, by_object, "{op}");
        }
        for op in [Op::CreateEq, Op::InitHca, Op::CreateMkey, Op::CreateUmem, Op::ManagePages] {
            assert_eq!(route(op), Route::Kernel, "{op}");
        }
        assert_eq!(route(Op::Init2RtrQp), Route::Modify(QueueKind::Qp));
    }
}
