//! The address that this process tells its peers, and how it was chosen.
//!
//! Owns nothing. In this order: what the command line says, what the configuration says, `HOST_IP`, `POD_IP`, and at
//! last the address from which this host reaches rank 0.

use core::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, ToSocketAddrs, UdpSocket};

use super::{BootstrapError, place};

/// Where an advertised address comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AddressSource {
    /// The command line.
    Flag,
    /// The configuration.
    Config,
    /// The variable `HOST_IP`.
    HostIp,
    /// The variable `POD_IP`.
    PodIp,
    /// The route to rank 0.
    Route,
}

impl AddressSource {
    /// Its name, as messages print it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Flag => "--advertise",
            Self::Config => "the configuration",
            Self::HostIp => "HOST_IP",
            Self::PodIp => "POD_IP",
            Self::Route => "the route to rank 0",
        }
    }
}

/// An address for peers, and its source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Advertised {
    /// The address.
    pub address: IpAddr,
    /// Where it comes from.
    pub source: AddressSource,
}

impl Advertised {
    /// The address of one of several ranks on a host.
    ///
    /// Ranks that meet over the loopback interface take one address of it each: 127.0.0.1, 127.0.0.2, and so on, so
    /// that all of them can use RoCEv2's own UDP port. Elsewhere a second rank behind one address takes another port.
    #[must_use]
    pub fn for_local_rank(self, local_rank: u32) -> Self {
        match self.address {
            IpAddr::V4(ip) if ip.is_loopback() => {
                let address = Ipv4Addr::from_bits(ip.to_bits().saturating_add(local_rank));
                Self { address: address.into(), ..self }
            }
            _ => self,
        }
    }
}

impl fmt::Display for Advertised {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (from {})", self.address, self.source.name())
    }
}

/// Chooses the address to tell peers; `master` is where rank 0 listens.
///
/// # Errors
/// `Unresolvable` for a name that leads nowhere: the next source is not tried, because somebody meant this one.
pub fn choose(
    flag: Option<&str>,
    config: Option<&str>,
    master: SocketAddr,
) -> Result<Advertised, BootstrapError> {
    choose_from(flag, config, place::advertise_variable, master)
}

fn choose_from(
    flag: Option<&str>,
    config: Option<&str>,
    lookup: impl Fn(&str) -> Option<String>,
    master: SocketAddr,
) -> Result<Advertised, BootstrapError> {
    let (host_ip, pod_ip) = (lookup("HOST_IP"), lookup("POD_IP"));
    let named = [
        (AddressSource::Flag, flag),
        (AddressSource::Config, config),
        (AddressSource::HostIp, host_ip.as_deref()),
        (AddressSource::PodIp, pod_ip.as_deref()),
    ];
    for (source, name) in named {
        // A pod template may leave a variable empty; an empty flag is somebody's mistake.
        let is_unset = |name: &str| name.is_empty() && source != AddressSource::Flag;
        if let Some(name) = name.filter(|name| !is_unset(name)) {
            let address = resolve(source.name(), name, 0)?.ip();
            return Ok(Advertised { address, source });
        }
    }
    let source = AddressSource::Route;
    let no_route = |_| BootstrapError::Unresolvable { origin: source.name(), name: master.to_string() };
    Ok(Advertised { address: route_to(master).map_err(no_route)?, source })
}

/// The first address that a name stands for; a literal address stands for itself.
///
/// # Errors
/// `Unresolvable`, with `origin` to say who used the name.
pub(super) fn resolve(origin: &'static str, name: &str, port: u16) -> Result<SocketAddr, BootstrapError> {
    let unresolvable = || BootstrapError::Unresolvable { origin, name: name.into() };
    let mut addresses = (name.trim(), port).to_socket_addrs().map_err(|_| unresolvable())?;
    addresses.next().ok_or_else(unresolvable)
}

/// The address that packets to `master` would leave from; nothing is sent.
fn route_to(master: SocketAddr) -> std::io::Result<IpAddr> {
    let any: IpAddr = match master {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let socket = UdpSocket::bind((any, 0))?;
    socket.connect(master)?;
    Ok(socket.local_addr()?.ip())
}

#[cfg(test)]
mod tests {
    use super::*;

    const MASTER: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 9);

    fn chosen(
        flag: Option<&str>,
        config: Option<&str>,
        vars: &[(&str, &str)],
    ) -> Result<Advertised, BootstrapError> {
        let lookup = |name: &str| Some(vars.iter().find(|(known, _)| *known == name)?.1.to_string());
        choose_from(flag, config, lookup, MASTER)
    }

    #[test]
    fn the_first_source_that_says_something_wins() {
        let vars = [("HOST_IP", "10.0.0.3"), ("POD_IP", "10.0.0.4")];
        let cases = [
            (chosen(Some("10.0.0.1"), Some("10.0.0.2"), &vars), "10.0.0.1 (from --advertise)"),
            (chosen(None, Some("10.0.0.2"), &vars), "10.0.0.2 (from the configuration)"),
            (chosen(None, None, &vars), "10.0.0.3 (from HOST_IP)"),
            (chosen(None, None, &vars[1..]), "10.0.0.4 (from POD_IP)"),
            (chosen(None, None, &[("HOST_IP", ""), ("POD_IP", "::1")]), "::1 (from POD_IP)"),
            (chosen(None, None, &[]), "127.0.0.1 (from the route to rank 0)"),
        ];
        for (found, expected) in cases {
            assert_eq!(found.unwrap().to_string(), expected);
        }
    }

    #[test]
    fn ranks_on_the_loopback_interface_have_addresses_of_their_own() {
        let at = |address: &str, local_rank| {
            let address = address.parse().unwrap();
            Advertised { address, source: AddressSource::Route }
                .for_local_rank(local_rank)
                .address
                .to_string()
        };
        assert_eq!((at("127.0.0.1", 0).as_str(), at("127.0.0.1", 300).as_str()), ("127.0.0.1", "127.0.1.45"));
        assert_eq!((at("10.0.0.1", 3).as_str(), at("::1", 3).as_str()), ("10.0.0.1", "::1"));
    }

    #[test]
    fn a_name_that_leads_nowhere_is_refused_and_not_passed_over() {
        for (found, origin, name) in [
            (chosen(Some("no.such.host.invalid"), None, &[]), "--advertise", "no.such.host.invalid"),
            (chosen(Some(""), None, &[]), "--advertise", ""),
            (chosen(None, None, &[("HOST_IP", "no.such.host.invalid")]), "HOST_IP", "no.such.host.invalid"),
            (chosen(None, Some("1.2.3.4.5"), &[]), "the configuration", "1.2.3.4.5"),
        ] {
            let Err(BootstrapError::Unresolvable { origin: found, name: who }) = found else {
                panic!("{name:?} was accepted: {found:?}");
            };
            assert_eq!((found, who.as_str()), (origin, name));
        }
    }
}
