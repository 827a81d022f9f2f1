//! Which NICs a rank is given: the nearest to what it serves, in turn among equals.
//!
//! Pure but for [`Anchor::of_process`]: distances are asked of whoever knows the machine. Owns nothing.
//!
//! A NIC far from the GPU works, and every byte crosses the link between sockets: so distance decides before anything
//! else, and only equally near NICs are shared out.

use std::fmt;

use super::doctor::{PciPath, Places};

/// What a rank's NIC should be near to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Anchor {
    /// The rank's GPU, by its PCI address.
    Gpu(String),
    /// The NUMA node on whose processors this process runs.
    Node(i32),
    /// Nothing: the process runs on several nodes, or the machine has one.
    Nothing,
}

impl Anchor {
    /// Where kernels on the host run.
    pub(super) fn of_process(places: &Places) -> Self {
        places.own_node().map_or(Self::Nothing, Self::Node)
    }
}

/// How near a NIC is, nearest first.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Nearness {
    /// The way between it and the GPU.
    Path(PciPath),
    /// It is on the node of this process.
    SameNode,
    /// It is on another node.
    OtherNode(i32),
    /// Nobody knows.
    Unknown,
}

/// A choice, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Choice {
    /// Name of the device.
    pub(super) name: String,
    reason: Reason,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Reason {
    /// The flag said so.
    Asked,
    /// It is the nearest, or one of as many as are equally near.
    Nearest { anchor: Anchor, nearness: Nearness, equals: usize },
}

impl fmt::Display for Choice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Reason::Nearest { anchor, nearness, equals } = &self.reason else {
            return f.write_str("by --nics");
        };
        match (nearness, anchor) {
            (Nearness::Path(path), Anchor::Gpu(gpu)) => write!(f, "{path} from GPU {gpu}")?,
            (Nearness::SameNode, Anchor::Node(node)) => write!(f, "on NUMA node {node}, as this process")?,
            (Nearness::OtherNode(node), _) => write!(f, "on NUMA node {node}, and no NIC is nearer")?,
            (_, Anchor::Nothing) => f.write_str("this process has no NUMA node of its own")?,
            (_, Anchor::Gpu(gpu)) => write!(f, "its distance from GPU {gpu} is not known")?,
            (_, Anchor::Node(_)) => f.write_str("its NUMA node is not known")?,
        }
        match equals {
            1 => Ok(()),
            equals => write!(f, "; in turn with {} equally near", equals - 1),
        }
    }
}

/// The device of each rank: those asked for in turn, else among `found` those nearest to the rank's anchor in turn.
/// Empty if there is none.
pub(super) fn choose(
    asked: &[String],
    found: &[String],
    anchors: &[Anchor],
    nearness: impl Fn(&Anchor, &str) -> Nearness,
) -> Vec<Choice> {
    if !asked.is_empty() {
        let in_turn = asked.iter().cycle().take(anchors.len());
        return in_turn.map(|name| Choice { name: name.clone(), reason: Reason::Asked }).collect();
    }
    let of_rank = |(rank, anchor): (usize, &Anchor)| {
        let measured: Vec<_> = found.iter().map(|name| (nearness(anchor, name), name)).collect();
        let best = measured.iter().map(|(nearness, _)| nearness).min()?.clone();
        let nearest: Vec<_> = measured.iter().filter(|(nearness, _)| *nearness == best).collect();
        let (anchor, equals) = (anchor.clone(), nearest.len());
        let name = nearest[rank % equals].1.clone();
        Some(Choice { name, reason: Reason::Nearest { anchor, nearness: best, equals } })
    };
    anchors.iter().enumerate().filter_map(of_rank).collect()
}

/// How near a NIC is by what the machine says of both.
pub(super) fn measure(places: &Places, anchor: &Anchor, nic: &str) -> Nearness {
    let Some(pci) = places.pci_of_nic(nic) else { return Nearness::Unknown };
    match anchor {
        Anchor::Gpu(gpu) => places.path(gpu, &pci).map_or(Nearness::Unknown, Nearness::Path),
        Anchor::Node(node) => match places.node(&pci) {
            Some(of_nic) if of_nic == *node => Nearness::SameNode,
            Some(of_nic) => Nearness::OtherNode(of_nic),
            None => Nearness::Unknown,
        },
        Anchor::Nothing => Nearness::Unknown,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(of: &[&str]) -> Vec<String> {
        of.iter().map(|name| (*name).to_owned()).collect()
    }

    fn chosen(choices: &[Choice]) -> Vec<&str> {
        choices.iter().map(|choice| choice.name.as_str()).collect()
    }

    #[test]
    fn each_gpu_gets_its_nearest_nics_in_turn() {
        let found = names(&["mlx5_0", "mlx5_1", "mlx5_2"]);
        let gpus = ["0000:17:00.0", "0000:17:00.0", "0000:ca:00.0", "0000:ca:00.0"];
        let anchors: Vec<_> = gpus.iter().map(|gpu| Anchor::Gpu((*gpu).to_owned())).collect();
        let near = |anchor: &Anchor, nic: &str| match (anchor, nic) {
            (Anchor::Gpu(gpu), "mlx5_2") if gpu.starts_with("0000:ca") => Nearness::Path(PciPath::Switch),
            (Anchor::Gpu(gpu), "mlx5_0" | "mlx5_1") if gpu.starts_with("0000:17") => {
                Nearness::Path(PciPath::HostBridge)
            }
            _ => Nearness::Path(PciPath::Sockets),
        };
        let choices = choose(&[], &found, &anchors, near);
        assert_eq!(chosen(&choices), ["mlx5_0", "mlx5_1", "mlx5_2", "mlx5_2"]);
        assert_eq!(
            choices[1].to_string(),
            "one host bridge away from GPU 0000:17:00.0; in turn with 1 equally near"
        );
        assert_eq!(choices[2].to_string(), "PCI switches away from GPU 0000:ca:00.0");
    }

    #[test]
    fn ranks_on_the_host_get_the_nics_of_their_node() {
        let found = names(&["mlx5_0", "mlx5_1", "mlx5_2"]);
        let near = |anchor: &Anchor, nic: &str| match (anchor, nic) {
            (Anchor::Nothing, _) => Nearness::Unknown,
            (Anchor::Node(1), "mlx5_1" | "mlx5_2") => Nearness::SameNode,
            (_, "mlx5_0") => Nearness::OtherNode(0),
            _ => Nearness::OtherNode(1),
        };
        let on = |anchor| choose(&[], &found, &vec![anchor; 3], near);
        assert_eq!(chosen(&on(Anchor::Node(1))), ["mlx5_1", "mlx5_2", "mlx5_1"]);
        let reason = on(Anchor::Node(1))[0].to_string();
        assert_eq!(reason, "on NUMA node 1, as this process; in turn with 1 equally near");
        assert_eq!(chosen(&on(Anchor::Nothing)), ["mlx5_0", "mlx5_1", "mlx5_2"]);
        let reason = on(Anchor::Nothing)[0].to_string();
        assert_eq!(reason, "this process has no NUMA node of its own; in turn with 2 equally near");
        let far = on(Anchor::Node(7));
        assert_eq!(far[0].to_string(), "on NUMA node 0, and no NIC is nearer");
    }

    #[test]
    fn what_was_asked_for_is_taken_whatever_is_nearer() {
        let asked = names(&["mlx5_9", "mlx5_3"]);
        let near = |_: &Anchor, _: &str| Nearness::SameNode;
        let choices = choose(&asked, &names(&["mlx5_0"]), &vec![Anchor::Nothing; 3], near);
        assert_eq!(chosen(&choices), ["mlx5_9", "mlx5_3", "mlx5_9"]);
        assert_eq!(choices[0].to_string(), "by --nics");
        assert_eq!(choose(&[], &[], &[Anchor::Nothing], near), []);
    }
}
