//! Runs the fuzz targets on a stable toolchain: with the inputs in `fuzz/corpus`, which `cargo fuzz` has found, and with random
//! ones, which are the same each time unless `FUZZ_SEED` chooses others.

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::Path;

#[path = "../fuzz/src/lib.rs"]
mod fuzz;

/// How many random inputs each target gets, and their greatest length in bytes.
const RANDOM_INPUTS: u64 = 1000;
const MAX_LEN: u64 = 2048;

/// Runs a target, and prints the name of an input that it fails with.
fn run(target: fuzz::Target, bytes: &[u8], name: &str) {
    if let Err(panic) = catch_unwind(AssertUnwindSafe(|| target(bytes))) {
        println!("the input was {name}");
        resume_unwind(panic);
    }
}

/// The next of a sequence of pseudo-random numbers: splitmix64.
fn random(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut mixed = *state;
    mixed = (mixed ^ mixed >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ mixed >> 31
}

#[test]
fn the_models_hold_for_the_corpus() {
    for (name, target) in fuzz::TARGETS {
        let directory = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("fuzz/corpus")
            .join(name);
        let mut count = 0;
        for entry in fs::read_dir(&directory).unwrap() {
            let path = entry.unwrap().path();
            run(
                target,
                &fs::read(&path).unwrap(),
                &path.display().to_string(),
            );
            count += 1;
        }
        println!("{name}: {count} inputs");
        assert!(count > 0, "{} is empty", directory.display());
    }
}

#[test]
fn the_models_hold_for_random_inputs() {
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
