//! What the lanes of a warp say to each other, on warp fibers and on lane fibers.

use std::sync::Arc;

use ibex::gpu::pool::{Pool, PoolConfig};

use crate::buffers::{Finished, Selftest};
use crate::rig;

#[test]
fn every_collective_gives_what_the_lanes_say() {
    let pool = Pool::new(PoolConfig::real_time(2)).unwrap();
    for (blocks, warps, n16) in [(1, 1, 0), (1, 1, 1), (1, 2, 31), (2, 5, 33), (3, 16, 448), (4, 32, 130)] {
        let finished = Arc::new(Finished::default());
        let mut run = Selftest::new(blocks, warps, n16);
        run.launch(&pool, 0, &finished);
        finished.wait_for(1);
        run.check();
    }
}

/// Reads what `rig selftest --print` writes: a name and hexadecimal words per line.
fn parse_selftest(text: &str, run: &mut Selftest) {
    for line in text.lines() {
        let mut fields = line.split_whitespace();
        let name = fields.next().unwrap();
        let words = fields.map(|w| u64::from_str_radix(w, 16).unwrap());
        let narrow = |w: u64| u32::try_from(w).unwrap();
        match name {
            "results" => run.results = words.map(narrow).collect(),
            "counters" => run.counters = words.map(narrow).collect(),
            "wide" => run.wide = words.collect(),
            "dst" => {
                let words: Vec<u32> = words.map(narrow).collect();
                run.dst = words.chunks_exact(4).map(|v| v.try_into().unwrap()).collect();
            }
            other => panic!("unknown line {other}"),
        }
    }
}

#[test]
fn lane_fibers_give_what_warp_fibers_give() {
    let rig = match rig::build(rig::Flavor::Plain) {
        Ok(rig) => rig,
        Err(why) => {
            rig::say_skipped(&format!("no C++ compiler at test time: {why}"));
            return;
        }
    };
    for (blocks, warps, n16) in [(1, 1, 0), (2, 5, 33), (3, 16, 448)] {
        for seed in ["0", "1", "2"] {
            let (b, w, n) = (blocks.to_string(), warps.to_string(), n16.to_string());
            let shape = ["--blocks", &b, "--warps", &w, "--n16", &n, "--seed", seed, "--print"];
            let output = rig::run_case(&rig, &[&["selftest"][..], &shape[..]].concat());
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            let mut run = Selftest::new(blocks, warps, n16);
            run.dst.clear();
            parse_selftest(&String::from_utf8_lossy(&output.stdout), &mut run);
            run.check();
        }
    }
    for case in ["pair", "fence-pair"] {
        assert!(rig::run_case(&rig, &[case, "--rounds", "50"]).status.success());
    }
}
