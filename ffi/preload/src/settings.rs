//! What a program that runs under the shim may set, all by environment variables.
//!
//! | variable | default | |
//! |---|---|---|
//! | `IBEX_PRELOAD_DEVICES` | 1 | devices in this process, `mlx5_0`, `mlx5_1`, .., on one fabric |
//! | `IBEX_PRELOAD_LINK` | `roce` | `roce` or `ib`: link layer of every port |
//! | `IBEX_PRELOAD_DOORBELLS` | `record` | `record`, or `strict`: a WQE runs only once a doorbell covers it |
//! | `IBEX_PRELOAD_DIR` | the system's directory for temporary files | where the sysfs tree is made |
//! | `IBEX_PRELOAD_REPORT` | none | file that gets the devices' counters and commands when the process ends |
//!//! | `IBEX_PRELOAD_MAILBOXES` | none | file to which every mailbox of the program is added, with its reply |
//!
//! A strict device remembers the last value of each doorbell register only. libmlx5 lets queue pairs of one context
//! share registers, so doorbells may be lost there, which is why `record` is the default; `hca::mlx5` gives each queue
//! pair a register of its own and can be held to `strict`.

use std::env;
use std::ffi::OsString;
use std::path::PathBuf;

use ibex_hca::LinkLayer;
use ibex_hca::emulated::Doorbells;

/// Most devices of one process.
const DEVICES_MAX: usize = 64;

/// Everything that can be set.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Settings {
    pub(crate) num_devices: usize,
    pub(crate) link: LinkLayer,
    pub(crate) doorbells: Doorbells,
    pub(crate) dir: PathBuf,
    pub(crate) report: Option<PathBuf>,
    pub(crate) mailboxes: Option<PathBuf>,
}

/// A variable has a value that means nothing.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{variable} is {value:?}; it must be {right}")]
pub(crate) struct BadSetting {
    variable: &'static str,
    value: OsString,
    right: &'static str,
}

impl Settings {
    /// What the environment says.
    pub(crate) fn from_env() -> Result<Self, BadSetting> {
        Self::read(env::var_os)
    }

    fn read(variable: impl Fn(&'static str) -> Option<OsString>) -> Result<Self, BadSetting> {
        let choice = |name, right, meaning: &dyn Fn(&str) -> Option<usize>| match variable(name) {
            None => Ok(None),
            Some(value) => match value.to_str().and_then(meaning) {
                Some(chosen) => Ok(Some(chosen)),
                None => Err(BadSetting { variable: name, value, right }),
            },
        };
        let among =
            |words: &'static [&'static str]| move |value: &str| words.iter().position(|word| *word == value);
        let count = |value: &str| value.parse().ok().filter(|count| (1..=DEVICES_MAX).contains(count));
        let devices = choice("IBEX_PRELOAD_DEVICES", "1..=64", &count)?;
        let link = choice("IBEX_PRELOAD_LINK", "roce or ib", &among(&["roce", "ib"]))?;
        let strict = choice("IBEX_PRELOAD_DOORBELLS", "record or strict", &among(&["record", "strict"]))?;
        Ok(Self {
            num_devices: devices.unwrap_or(1),
            link: if link == Some(1) { LinkLayer::Ib } else { LinkLayer::Roce },
            doorbells: if strict == Some(1) { Doorbells::Strict } else { Doorbells::Record },
            dir: variable("IBEX_PRELOAD_DIR").map_or_else(env::temp_dir, PathBuf::from),
            report: variable("IBEX_PRELOAD_REPORT").map(PathBuf::from),
            mailboxes: variable("IBEX_PRELOAD_MAILBOXES").map(PathBuf::from),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(set: &[(&str, &str)]) -> Result<Settings, BadSetting> {
        let find = |name| set.iter().find(|(variable, _)| *variable == name);
        Settings::read(|name| find(name).map(|(_, value)| value.into()))
    }

    #[test]
    fn every_variable_has_a_default_and_refuses_what_means_nothing() {
        let settings = read(&[]).unwrap();
        assert_eq!((settings.num_devices, settings.link), (1, LinkLayer::Roce));
        assert_eq!(settings.doorbells, Doorbells::Record);
        let all = [("IBEX_PRELOAD_DEVICES", "8"), ("IBEX_PRELOAD_LINK", "ib")];
        let settings = read(&[all[0], all[1], ("IBEX_PRELOAD_DOORBELLS", "strict")]).unwrap();
        assert_eq!((settings.num_devices, settings.link), (8, LinkLayer::Ib));
        assert_eq!(settings.doorbells, Doorbells::Strict);
        for (variable, value) in [
            ("IBEX_PRELOAD_DEVICES", "0"),
            ("IBEX_PRELOAD_DEVICES", "65"),
            ("IBEX_PRELOAD_LINK", "ethernet"),
            ("IBEX_PRELOAD_DOORBELLS", ""),
        ] {
            let refusal = read(&[(variable, value)]).unwrap_err();
            assert_eq!((refusal.variable, refusal.value), (variable, value.into()));
        }
    }
}
