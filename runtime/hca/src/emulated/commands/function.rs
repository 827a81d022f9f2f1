//! The life of the device function, and the registers of its port: what a driver sends before it makes objects.
//!
//! The device is ready from the start and wants no memory of its own, so that bringing it up changes nothing; a driver
//! that does it in order is answered as by hardware. The port is up unless its link was taken away
//! (`emulated/mishaps.rs`); no driver can take it down.

use ibex_abi::eqe::{Event, PortChange};
use ibex_abi::prm::{self, Status};

use super::{CommandSyndrome, Done, Refusal, Touched, refuse};
use crate::emulated::EmulatedHca;
use crate::emulated::trace::ObjectKind;

/// Interface revisions that the device speaks, a bit each: 0 and 1.
const ISSIS: u64 = 0b11;
/// Registers of ACCESS_REG.
const HOST_ENDIANNESS: u64 = 0x7004;
const PAOS: u64 = 0x5006;
/// PAOS: a port that is up, and one that is down.
const PORT_UP: u64 = 1;
const PORT_DOWN: u64 = 2;
/// A datagram that asks for PortInfo, and the mark of an answer. SPEC: IBTA vol. 1 §13.4.5, §14.2.5.6.
const METHOD_GET: u64 = 0x01;
const METHOD_RESPONSE: u64 = 0x80;
const ATTRIBUTE_PORT_INFO: u64 = 0x15;
/// Where a subnet management datagram has its attribute.
const SMP_DATA: usize = 64;
/// Fields of PortInfo, by their byte: LID, state, physical state.
const PORT_INFO_LID: usize = 16;
const PORT_INFO_STATE: usize = 32;
const PORT_INFO_PHYSICAL: usize = 33;

const DONE: Touched = Touched { kind: ObjectKind::Device, number: None };

const fn unknown_register() -> Refusal {
    refuse(Status::BadParam, CommandSyndrome::BadIndex)
}

impl EmulatedHca {
    /// ENABLE_HCA, DISABLE_HCA, INIT_HCA, TEARDOWN_HCA, SET_HCA_CAP: accepted, and nothing changes by them.
    pub(super) fn change_function(&self) -> Done {
        Ok(DONE)
    }

    pub(super) fn query_issi(&self, output: &mut [u8]) -> Done {
        prm::set(output, prm::query_issi_out::SUPPORTED_ISSI_DW0, ISSIS);
        Ok(DONE)
    }

    pub(super) fn set_issi(&self, input: &[u8]) -> Done {
        match prm::get(input, prm::set_issi_in::CURRENT_ISSI) {
            0 | 1 => Ok(DONE),
            _ => Err(refuse(Status::BadParam, CommandSyndrome::BadIndex)),
        }
    }

    /// MANAGE_PAGES: the device asked for none, and takes none.
    pub(super) fn manage_pages(&self, input: &[u8]) -> Done {
        match prm::get(input, prm::manage_pages_in::INPUT_NUM_ENTRIES) {
            0 => Ok(DONE),
            _ => Err(refuse(Status::BadParam, CommandSyndrome::BadLength)),
        }
    }

    pub(super) fn access_register(&self, input: &[u8], output: &mut [u8]) -> Done {
        use prm::{access_register_in as cmd, access_register_out as reply};
        let (from, to) = (cmd::REGISTER_DATA.bytes().start, reply::REGISTER_DATA.bytes().start);
        let (Some(given), Some(answer)) = (input.get(from..), output.get_mut(to..)) else {
            return Err(refuse(Status::BadInpLen, CommandSyndrome::InputLength));
        };
        match prm::get(input, cmd::REGISTER_ID) {
            // Host byte order is the only one that the device knows.
            HOST_ENDIANNESS => Ok(DONE),
            PAOS => self.access_port(given, answer),
            _ => Err(unknown_register()),
        }
    }

    /// Administrative and operational status of the port. Whoever asks for a port that is up gets its event.
    fn access_port(&self, given: &[u8], answer: &mut [u8]) -> Done {
        use prm::paos_reg as paos;
        if given.len() < paos::LEN || answer.len() < paos::LEN {
            return Err(refuse(Status::BadInpLen, CommandSyndrome::InputLength));
        }
        let port = prm::get(given, paos::LOCAL_PORT);
        if port != u64::from(self.port.port_num) {
            return Err(refuse(Status::BadParam, CommandSyndrome::BadPort));
        }
        if prm::get(given, paos::ASE) == 1 {
            if prm::get(given, paos::ADMIN_STATUS) != PORT_UP {
                return Err(refuse(Status::BadParam, CommandSyndrome::BadPort));
            }
            if self.is_port_up() {
                self.tell(Event::PortChange { port: self.port.port_num, change: PortChange::Active });
            }
        }
        prm::set(answer, paos::LOCAL_PORT, port);
        prm::set(answer, paos::ADMIN_STATUS, PORT_UP);
        prm::set(answer, paos::OPER_STATUS, if self.is_port_up() { PORT_UP } else { PORT_DOWN });
        Ok(DONE)
    }

    /// MAD_IFC: of all datagrams, one that reads PortInfo.
    pub(super) fn mad_ifc(&self, input: &[u8], output: &mut [u8]) -> Done {
        use prm::{mad, mad_ifc_in as cmd, mad_ifc_out as reply};
        let (from, to) = (cmd::MAD.bytes().start, reply::RESPONSE_MAD_PACKET.bytes().start);
        let asked = &input[from..from + mad::LEN];
        let is_get = prm::get(asked, mad::METHOD) == METHOD_GET;
        if !is_get || prm::get(asked, mad::ATTRIBUTE_ID) != ATTRIBUTE_PORT_INFO {
            return Err(refuse(Status::BadPkt, CommandSyndrome::UnknownOpcode));
        }
        let answer = &mut output[to..to + mad::LEN];
        answer.copy_from_slice(asked);
        prm::set(answer, mad::METHOD, METHOD_GET | METHOD_RESPONSE);
        let info = &mut answer[SMP_DATA..];
        info[PORT_INFO_LID..PORT_INFO_LID + 2].copy_from_slice(&self.port.lid.0.to_be_bytes());
        // CAST: codes of 4 bits.
        let (state, physical) = self.port_states();
        info[PORT_INFO_STATE] = state as u8;
        info[PORT_INFO_PHYSICAL] = (physical as u8) << 4;
        Ok(DONE)
    }

    /// Says in the event queues that want it that commands ended which came by another way than a call, a bit for each
    /// slot of the command queue.
    pub fn tell_commands_done(&self, slots: u32) {
        self.tell(Event::CommandsDone { slots });
    }
}
