//! A rank's place in its group, as the launcher that started it says.
//!
//! Owns nothing. This is the one file of the runtime that reads the environment; everything else is told.
//!
//! | what | `ibex launch`, torchrun | Slurm | Open MPI | MPICH, Intel MPI (hydra) |
//! |---|---|---|---|---|
//! | rank | `RANK` | `SLURM_PROCID` | `OMPI_COMM_WORLD_RANK` | `PMI_RANK` |
//! | ranks | `WORLD_SIZE` | `SLURM_NTASKS` | `OMPI_COMM_WORLD_SIZE` | `PMI_SIZE` |
//! | rank on this host | `LOCAL_RANK` | `SLURM_LOCALID` | `OMPI_COMM_WORLD_LOCAL_RANK` | `MPI_LOCALRANKID` |
//! | ranks on this host | `LOCAL_WORLD_SIZE` | | `OMPI_COMM_WORLD_LOCAL_SIZE` | `MPI_LOCALNRANKS` |
//!
//! The first column overrules the others. Rank 0 listens at `MASTER_ADDR` and, in this order: `IBEX_PORT`; the port
//! behind `MASTER_PORT` under torchrun, whose own store sits on `MASTER_PORT`; `MASTER_PORT`; [`DEFAULT_PORT`].

use core::fmt;
use core::hint::black_box;

use super::BootstrapError;
use crate::config::NUM_RANKS_MAX;
use crate::ids::Rank;

/// Port of the rendezvous where nothing names one.
pub const DEFAULT_PORT: u16 = 29417;
/// Longest token.
pub const TOKEN_LEN_MAX: usize = 256;

/// Who started this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Launcher {
    /// `RANK` and `WORLD_SIZE`: ibex launch, torchrun, or a script.
    Variables,
    /// `SLURM_PROCID`.
    Slurm,
    /// `OMPI_COMM_WORLD_RANK`.
    OpenMpi,
    /// `PMI_RANK`.
    Hydra,
    /// None: a group of one.
    Nobody,
}

/// Variables of one launcher: rank, ranks, rank on this host, ranks on this host.
struct Names {
    launcher: Launcher,
    rank: &'static str,
    num_ranks: &'static str,
    local_rank: &'static str,
    num_local: &'static str,
}

const LAUNCHERS: [Names; 4] = [
    Names {
        launcher: Launcher::Variables,
        rank: "RANK",
        num_ranks: "WORLD_SIZE",
        local_rank: "LOCAL_RANK",
        num_local: "LOCAL_WORLD_SIZE",
    },
    Names {
        launcher: Launcher::OpenMpi,
        rank: "OMPI_COMM_WORLD_RANK",
        num_ranks: "OMPI_COMM_WORLD_SIZE",
        local_rank: "OMPI_COMM_WORLD_LOCAL_RANK",
        num_local: "OMPI_COMM_WORLD_LOCAL_SIZE",
    },
    Names {
        launcher: Launcher::Hydra,
        rank: "PMI_RANK",
        num_ranks: "PMI_SIZE",
        local_rank: "MPI_LOCALRANKID",
        num_local: "MPI_LOCALNRANKS",
    },
    // Last: inside a Slurm allocation mpirun sets its own, and those are the ranks.
    Names {
        launcher: Launcher::Slurm,
        rank: "SLURM_PROCID",
        num_ranks: "SLURM_NTASKS",
        local_rank: "SLURM_LOCALID",
        num_local: "SLURM_STEP_TASKS_ON_NODE",
    },
];

/// What all ranks of one group know and other jobs do not.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Token(Vec<u8>);

impl Token {
    /// A token of at most [`TOKEN_LEN_MAX`] bytes.
    ///
    /// # Errors
    /// `TooLarge`.
    pub fn new(token: &str) -> Result<Self, BootstrapError> {
        let (what, len, max) = ("token", token.len(), TOKEN_LEN_MAX);
        if len > max {
            return Err(BootstrapError::TooLarge { what, len, max });
        }
        Ok(Self(token.into()))
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.0
    }

    /// Compares in a time that tells nothing but the length: no byte's verdict ends the loop.
    pub(super) fn is(&self, other: &[u8]) -> bool {
        let differences = self.0.iter().zip(other).fold(0, |all, (a, b)| black_box(all | (a ^ b)));
        self.0.len() == other.len() && differences == 0
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Token({} bytes)", self.0.len())
    }
}

/// A rank's place in its group and where the group meets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// This rank.
    pub rank: Rank,
    /// Ranks of the group.
    pub num_ranks: u32,
    /// This rank among those of its host.
    pub local_rank: u32,
    /// Who said so.
    pub launcher: Launcher,
    /// Name or address of rank 0's host.
    pub master_host: String,
    /// Port of the rendezvous.
    pub master_port: u16,
    /// What keeps other jobs out.
    pub token: Token,
}

impl Place {
    /// The only rank of a group of one: for a program that no launcher started.
    #[must_use]
    pub fn alone() -> Self {
        Self {
            rank: Rank(0),
            num_ranks: 1,
            local_rank: 0,
            launcher: Launcher::Nobody,
            master_host: "127.0.0.1".into(),
            // Any port that is free: nobody else looks for it.
            master_port: 0,
            token: Token::default(),
        }
    }

    /// The place that this process's environment spells; none if no launcher started it.
    ///
    /// # Errors
    /// As [`Place::from_vars`].
    pub fn from_env() -> Result<Option<Self>, BootstrapError> {
        Self::from_vars(variable)
    }

    /// The place that `lookup` spells; none if no launcher's variables are set.
    ///
    /// # Errors
    /// `Variable` for a value that is no number or outside its limit, `Incomplete` if one of a pair is missing.
    pub fn from_vars(lookup: impl Fn(&str) -> Option<String>) -> Result<Option<Self>, BootstrapError> {
        // An allocation without ranks sets SLURM_NTASKS alone; only a rank makes a rank.
        let Some(names) = LAUNCHERS.iter().find(|names| lookup(names.rank).is_some()) else {
            return match lookup("WORLD_SIZE") {
                Some(_) => Err(BootstrapError::Incomplete { found: "WORLD_SIZE", missing: "RANK" }),
                None => Ok(None),
            };
        };
        let number = |name, max| number(name, lookup(name), max);
        let missing = BootstrapError::Incomplete { found: names.rank, missing: names.num_ranks };
        let num_ranks = number(names.num_ranks, NUM_RANKS_MAX)?.ok_or(missing)?;
        if num_ranks == 0 {
            let (name, value) = (names.num_ranks, "0".into());
            return Err(BootstrapError::Variable { name, value, expected: "at least 1" });
        }
        let rank = number(names.rank, NUM_RANKS_MAX)?.unwrap_or(0);
        if rank >= num_ranks {
            let (name, value) = (names.rank, rank.to_string());
            return Err(BootstrapError::Variable { name, value, expected: "below the number of ranks" });
        }
        let num_local = number(names.num_local, NUM_RANKS_MAX)?;
        Ok(Some(Self {
            // CAST: below NUM_RANKS_MAX.
            rank: Rank(rank as u16),
            num_ranks,
            local_rank: number(names.local_rank, NUM_RANKS_MAX)?.unwrap_or(0),
            launcher: names.launcher,
            master_host: master_host(&lookup, names.rank, num_local == Some(num_ranks))?,
            master_port: master_port(&lookup)?,
            token: token(&lookup)?,
        }))
    }
}

/// Reads the environment, for the whole runtime.
fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok()
}

/// How many of this process's streams the CUDA driver lets make progress beside each other, if somebody has told it
/// (`CUDA_DEVICE_MAX_CONNECTIONS`).
#[must_use]
pub fn cuda_connections() -> Option<u32> {
    variable("CUDA_DEVICE_MAX_CONNECTIONS")?.trim().parse().ok()
}

/// [`super::advertise::choose`] with this process's environment.
pub(super) fn advertise_variable(name: &str) -> Option<String> {
    variable(name)
}

fn number(name: &'static str, value: Option<String>, max: u32) -> Result<Option<u32>, BootstrapError> {
    let Some(value) = value else { return Ok(None) };
    match value.trim().parse() {
        Ok(number) if number <= max => Ok(Some(number)),
        _ => Err(BootstrapError::Variable { name, value, expected: "a number of at most 512" }),
    }
}

fn master_host(
    lookup: &impl Fn(&str) -> Option<String>,
    rank_name: &'static str,
    is_one_host: bool,
) -> Result<String, BootstrapError> {
    match lookup("MASTER_ADDR").filter(|host| !host.trim().is_empty()) {
        Some(host) => Ok(host.trim().into()),
        None if is_one_host => Ok("127.0.0.1".into()),
        None => Err(BootstrapError::Incomplete { found: rank_name, missing: "MASTER_ADDR" }),
    }
}

fn master_port(lookup: &impl Fn(&str) -> Option<String>) -> Result<u16, BootstrapError> {
    let port = |name: &'static str, max: u16| match lookup(name) {
        None => Ok(None),
        Some(value) => match value.trim().parse::<u16>() {
            Ok(port) if (1..=max).contains(&port) => Ok(Some(port)),
            _ => Err(BootstrapError::Variable { name, value, expected: "a port from 1 to 65535" }),
        },
    };
    if let Some(port) = port("IBEX_PORT", u16::MAX)? {
        return Ok(port);
    }
    Ok(match lookup("TORCHELASTIC_RUN_ID") {
        Some(_) => port("MASTER_PORT", u16::MAX - 1)?.map_or(DEFAULT_PORT, |port| port + 1),
        None => port("MASTER_PORT", u16::MAX)?.unwrap_or(DEFAULT_PORT),
    })
}

/// Without a token the job's own number at least keeps jobs apart; it is no secret.
fn token(lookup: &impl Fn(&str) -> Option<String>) -> Result<Token, BootstrapError> {
    let job = || {
        let names = ["TORCHELASTIC_RUN_ID", "SLURM_JOB_ID", "PMIX_NAMESPACE", "PMI_ID"];
        names.iter().find_map(|name| Some(format!("{name}={}", lookup(name)?)))
    };
    Token::new(&lookup("IBEX_TOKEN").or_else(job).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(vars: &[(&str, &str)]) -> Result<Option<Place>, BootstrapError> {
        Place::from_vars(|name| Some(vars.iter().find(|(known, _)| *known == name)?.1.to_string()))
    }

    fn found(vars: &[(&str, &str)]) -> (u16, u32, u32, Launcher, String, u16) {
        let p = place(vars).unwrap().unwrap();
        (p.rank.0, p.num_ranks, p.local_rank, p.launcher, p.master_host, p.master_port)
    }

    #[test]
    fn launchers_are_understood() {
        let torchrun = [
            ("RANK", "3"),
            ("WORLD_SIZE", "8"),
            ("LOCAL_RANK", "1"),
            ("MASTER_ADDR", "node7"),
            ("MASTER_PORT", "29500"),
            ("TORCHELASTIC_RUN_ID", "none"),
        ];
        assert_eq!(found(&torchrun), (3, 8, 1, Launcher::Variables, "node7".into(), 29501));
        assert_eq!(found(&torchrun[..5]), (3, 8, 1, Launcher::Variables, "node7".into(), 29500));
        let slurm = [
            ("SLURM_PROCID", "5"),
            ("SLURM_NTASKS", "6"),
            ("SLURM_LOCALID", "2"),
            ("MASTER_ADDR", "n1"),
            ("IBEX_PORT", "77"),
        ];
        assert_eq!(found(&slurm), (5, 6, 2, Launcher::Slurm, "n1".into(), 77));
        let mpi = [
            ("SLURM_PROCID", "0"),
            ("SLURM_NTASKS", "1"),
            ("OMPI_COMM_WORLD_RANK", "1"),
            ("OMPI_COMM_WORLD_SIZE", "2"),
            ("OMPI_COMM_WORLD_LOCAL_SIZE", "2"),
        ];
        assert_eq!(found(&mpi), (1, 2, 0, Launcher::OpenMpi, "127.0.0.1".into(), DEFAULT_PORT));
        let hydra = [("PMI_RANK", "1"), ("PMI_SIZE", "2"), ("MPI_LOCALRANKID", "1"), ("MASTER_ADDR", "h")];
        assert_eq!(found(&hydra), (1, 2, 1, Launcher::Hydra, "h".into(), DEFAULT_PORT));
    }

    #[test]
    fn no_launcher_is_no_error() {
        assert_eq!(place(&[]).unwrap(), None);
        assert_eq!(place(&[("SLURM_NTASKS", "4")]).unwrap(), None);
    }

    #[test]
    fn half_a_launcher_and_broken_numbers_are_refused_by_name() {
        for (vars, message) in [
            (&[("RANK", "0")][..], "RANK is set, but WORLD_SIZE is not"),
            (&[("WORLD_SIZE", "2")], "WORLD_SIZE is set, but RANK is not"),
            (&[("RANK", "0"), ("WORLD_SIZE", "2")], "RANK is set, but MASTER_ADDR is not"),
            (
                &[("RANK", "2"), ("WORLD_SIZE", "2")],
                "RANK=\"2\" is refused: it must be below the number of ranks",
            ),
            (&[("RANK", "0"), ("WORLD_SIZE", "0")], "WORLD_SIZE=\"0\""),
            (&[("RANK", "x"), ("WORLD_SIZE", "2")], "RANK=\"x\""),
            (&[("RANK", "0"), ("WORLD_SIZE", "513")], "a number of at most 512"),
            (
                &[("RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "a"), ("MASTER_PORT", "0")],
                "MASTER_PORT=\"0\"",
            ),
            (
                &[
                    ("RANK", "0"),
                    ("WORLD_SIZE", "1"),
                    ("MASTER_ADDR", "a"),
                    ("MASTER_PORT", "65535"),
                    ("TORCHELASTIC_RUN_ID", "x"),
                ],
                "MASTER_PORT=\"65535\"",
            ),
        ] {
            let error = place(vars).unwrap_err().to_string();
            assert!(error.contains(message), "{error}");
        }
    }

    #[test]
    fn tokens_compare_whole_and_never_show() {
        let token = Token::new("abc").unwrap();
        assert!(
            token.is(b"abc") && !token.is(b"abd") && !token.is(b"ab") && !token.is(b"abcd") && !token.is(b"")
        );
        assert_eq!(format!("{token:?}"), "Token(3 bytes)");
        assert!(Token::new(&"x".repeat(TOKEN_LEN_MAX + 1)).is_err());
        let base = [("RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "a")];
        let token = |more: &[(&'static str, &'static str)]| {
            place(&[&base[..], more].concat()).unwrap().unwrap().token
        };
        assert_eq!(token(&[("IBEX_TOKEN", "t"), ("SLURM_JOB_ID", "9")]), Token::new("t").unwrap());
        assert_eq!(token(&[("SLURM_JOB_ID", "9")]), Token::new("SLURM_JOB_ID=9").unwrap());
        assert_eq!(token(&[]), Token::default());
    }
}
