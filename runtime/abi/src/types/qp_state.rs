//! Queue pair states and the commands that move between them.
//!
//! ```text
//!          RST2INIT       INIT2RTR       RTR2RTS
//!   Reset ---------> Init --------> Rtr --------> Rts <---> Sqd (SQD_RTS back)
//!     ^               |  |           |             |  |
//!     |  2RST         v  v INIT2INIT v             v  v RTS2RTS
//!     +---- any      Err <------- 2ERR from any    Sqer (SQERR2RTS back)
//! ```
//!
//! Invariant: [`QpState::after`] is the only place that says what is legal; the emulated device
//! and the driver both ask it.

use std::fmt;

/// State of a queue pair, with the code that `qpc.state` carries.
///
/// SPEC: IBTA vol. 1 §10.3.1; codes as mlx5 hardware reports them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum QpState {
    /// Created; holds no connection and takes no work.
    Reset = 0,
    /// Access rights and port are known; receives may be posted.
    Init = 1,
    /// Ready to receive: the remote end is known.
    Rtr = 2,
    /// Ready to send: fully connected.
    Rts = 3,
    /// The send queue failed on an unreliable transport; the receive queue works.
    Sqer = 4,
    /// The send queue is drained.
    Sqd = 5,
    /// All outstanding work is flushed in error.
    Err = 6,
    /// The send queue is draining.
    SqDraining = 7,
    /// Suspended by the device manager.
    Suspended = 9,
}

impl QpState {
    /// Every state, in the order of their codes.
    pub const ALL: [Self; 9] = [
        Self::Reset,
        Self::Init,
        Self::Rtr,
        Self::Rts,
        Self::Sqer,
        Self::Sqd,
        Self::Err,
        Self::SqDraining,
        Self::Suspended,
    ];

    /// The code that `qpc.state` carries.
    #[must_use]
    pub const fn code(self) -> u8 {
        // CAST: a fieldless enum of representation u8.
        self as u8
    }

    /// The state that a code stands for.
    #[must_use]
    pub fn from_code(code: u64) -> Option<Self> {
        Self::ALL.into_iter().find(|state| u64::from(state.code()) == code)
    }

    /// The state that a legal command leads to.
    ///
    /// # Errors
    /// [`IllegalTransition`] if the device refuses this command in this state (status 0x10).
    pub fn after(self, command: QpTransition) -> Result<Self, IllegalTransition> {
        use QpState::{Err as Error, Init, Reset, Rtr, Rts, Sqd, Sqer};
        match (self, command) {
            (Reset, QpTransition::Rst2Init) | (Init, QpTransition::Init2Init) => Ok(Init),
            (Init, QpTransition::Init2Rtr) => Ok(Rtr),
            (Rtr, QpTransition::Rtr2Rts)
            | (Rts, QpTransition::Rts2Rts)
            | (Sqer, QpTransition::SqErr2Rts)
            | (Sqd, QpTransition::Sqd2Rts) => Ok(Rts),
            (_, QpTransition::ToErr) => Ok(Error),
            (_, QpTransition::ToReset) => Ok(Reset),
            _ => Err(IllegalTransition { state: self, command }),
        }
    }

    /// Whether the device executes send work requests in this state.
    #[must_use]
    pub const fn executes_sends(self) -> bool {
        matches!(self, Self::Rts | Self::SqDraining)
    }

    /// Whether the device accepts packets from the remote end in this state.
    #[must_use]
    pub const fn responds(self) -> bool {
        matches!(self, Self::Rtr | Self::Rts | Self::Sqer | Self::Sqd | Self::SqDraining)
    }
}

impl fmt::Display for QpState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Reset => "RST",
            Self::Init => "INIT",
            Self::Rtr => "RTR",
            Self::Rts => "RTS",
            Self::Sqer => "SQER",
            Self::Sqd => "SQD",
            Self::Err => "ERR",
            Self::SqDraining => "SQDRAINING",
            Self::Suspended => "SUSPENDED",
        })
    }
}

/// A command that modifies a queue pair's state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum QpTransition {
    /// `RST2INIT_QP`.
    Rst2Init,
    /// `INIT2INIT_QP`.
    Init2Init,
    /// `INIT2RTR_QP`.
    Init2Rtr,
    /// `RTR2RTS_QP`.
    Rtr2Rts,
    /// `RTS2RTS_QP`.
    Rts2Rts,
    /// `SQERR2RTS_QP`.
    SqErr2Rts,
    /// `SQD_RTS_QP`.
    Sqd2Rts,
    /// `2ERR_QP`: legal in every state.
    ToErr,
    /// `2RST_QP`: legal in every state.
    ToReset,
}

impl QpTransition {
    /// Every command.
    pub const ALL: [Self; 9] = [
        Self::Rst2Init,
        Self::Init2Init,
        Self::Init2Rtr,
        Self::Rtr2Rts,
        Self::Rts2Rts,
        Self::SqErr2Rts,
        Self::Sqd2Rts,
        Self::ToErr,
        Self::ToReset,
    ];
}

impl fmt::Display for QpTransition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Rst2Init => "RST2INIT",
            Self::Init2Init => "INIT2INIT",
            Self::Init2Rtr => "INIT2RTR",
            Self::Rtr2Rts => "RTR2RTS",
            Self::Rts2Rts => "RTS2RTS",
            Self::SqErr2Rts => "SQERR2RTS",
            Self::Sqd2Rts => "SQD_RTS",
            Self::ToErr => "2ERR",
            Self::ToReset => "2RST",
        })
    }
}

/// A command that the device refuses in the queue pair's present state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{command} is illegal for a queue pair in state {state}")]
pub struct IllegalTransition {
    /// The state the queue pair is in, and stays in.
    pub state: QpState,
    /// The command that was refused.
    pub command: QpTransition,
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The whole table, so that a change to it shows in a diff; `-` is refused.
    const TABLE: &str = "\
state      | RST2INIT  INIT2INIT INIT2RTR  RTR2RTS   RTS2RTS   SQERR2RTS SQD_RTS   2ERR      2RST
RST        | INIT      -         -         -         -         -         -         ERR       RST
INIT       | -         INIT      RTR       -         -         -         -         ERR       RST
RTR        | -         -         -         RTS       -         -         -         ERR       RST
RTS        | -         -         -         -         RTS       -         -         ERR       RST
SQER       | -         -         -         -         -         RTS       -         ERR       RST
SQD        | -         -         -         -         -         -         RTS       ERR       RST
ERR        | -         -         -         -         -         -         -         ERR       RST
SQDRAINING | -         -         -         -         -         -         -         ERR       RST
SUSPENDED  | -         -         -         -         -         -         -         ERR       RST
";

    fn render() -> String {
        let mut lines = vec![String::from("state      |")];
        for command in QpTransition::ALL {
            lines[0] += &format!(" {command:<9}");
        }
        for state in QpState::ALL {
            let mut line = format!("{state:<10} |");
            for command in QpTransition::ALL {
                match state.after(command) {
                    Ok(next) => line += &format!(" {next:<9}"),
                    Err(refused) => {
                        assert_eq!(refused, IllegalTransition { state, command });
                        line += " -        ";
                    }
                }
            }
            lines.push(line);
        }
        lines.iter().map(|line| format!("{}\n", line.trim_end())).collect()
    }

    #[test]
    fn every_state_and_command_is_as_in_the_table() {
        let rendered = render();
        assert_eq!(rendered, TABLE, "\nthe table now reads:\n{rendered}");
    }

    #[test]
    fn state_codes_are_the_hardware_codes() {
        let codes = QpState::ALL.map(QpState::code);
        assert_eq!(codes, [0, 1, 2, 3, 4, 5, 6, 7, 9]);
        for state in QpState::ALL {
            assert_eq!(QpState::from_code(u64::from(state.code())), Some(state));
        }
        assert_eq!(QpState::from_code(8), None);
        assert_eq!(QpState::from_code(256), None);
    }
}
