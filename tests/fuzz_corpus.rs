//! Runs the fuzz targets on a stable toolchain: with the inputs that `cargo fuzz` has found worth keeping, and with a few
//! that are random, but the same each time. `FUZZ_SEED` chooses others.

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::Path;

#[path = "../fuzz/src/lib.rs"]
mod fuzz;

/// How many random inputs every target gets, and how long they are at most, in bytes.
const RANDOM_INPUTS: u64 = 1000;
const MAX_LEN: u64 = 2048;

/// Runs a target, and says with which input where it fails.
fn run(target: fuzz::Target, bytes: &[u8], name: &str) {
    if let Err(panic) = catch_unwind(AssertUnwindSafe(|| target(bytes))) {
        println!("the input was {name}");
        resume_unwind(panic);
    }
}

/// A sequence of numbers that look random: splitmix64.
fn random(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut mixed = *state;
    mixed = (mixed ^ mixed >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ mixed >> 31
}

#[test]
fn what_was_found_worth_keeping_holds() {
    for (name, target) in fuzz::TARGETS {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("fuzz/corpus")
            .join(name);
        let mut count = 0;
        for entry in fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            run(
                target,
                &fs::read(&path).unwrap(),
                &path.display().to_string(),
            );
            count += 1;
        }
        println!("{name}: {count} inputs");
        assert!(count > 0, "{} is empty", folder.display());
    }
}

#[test]
fn random_inputs_hold() {
    let seed = std::env::var("FUZZ_SEED").map_or(1, |seed| seed.parse().unwrap());
    println!("FUZZ_SEED={seed}");
    for (name, target) in fuzz::TARGETS {
        let mut state = seed;
        for number in 0..RANDOM_INPUTS {
            let len = random(&mut state) % MAX_LEN;
            let bytes: Vec<u8> = (0..len).map(|_| random(&mut state) as u8).collect();
            run(
                target,
                &bytes,
                &format!("{name}, random input {number} of FUZZ_SEED={seed}"),
            );
        }
    }
}
