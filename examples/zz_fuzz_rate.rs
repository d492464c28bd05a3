//! How many inputs a second a target takes.
use std::fs;
use std::path::Path;
use std::time::Instant;

#[path = "../fuzz/src/lib.rs"]
#[allow(dead_code)]
mod fuzz;

fn random(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut mixed = *state;
    mixed = (mixed ^ mixed >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ mixed >> 31
}

fn cpu() -> f64 {
    let text = fs::read_to_string("/proc/self/schedstat").unwrap();
    text.split(' ').next().unwrap().parse::<f64>().unwrap() / 1e9
}

fn main() {
    let want = std::env::args().nth(1);
    let seconds: f64 = std::env::args().nth(2).map_or(5.0, |s| s.parse().unwrap());
    let seed: u64 = std::env::args().nth(3).map_or(7, |s| s.parse().unwrap());
    for (name, target) in fuzz::TARGETS {
        if want.as_ref().is_some_and(|w| w != name) {
            continue;
        }
        let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("fuzz/corpus")
            .join(name);
        let corpus: Vec<Vec<u8>> = {
            let mut paths: Vec<_> = fs::read_dir(&folder)
                .unwrap()
                .map(|e| e.unwrap().path())
                .collect();
            paths.sort();
            paths.iter().map(|p| fs::read(p).unwrap()).collect()
        };
        let mut state = seed;
        let mut mutate = |corpus: &[Vec<u8>]| {
            let mut bytes = corpus[random(&mut state) as usize % corpus.len()].clone();
            for _ in 0..1 + random(&mut state) % 6 {
                if bytes.is_empty() {
                    break;
                }
                let at = random(&mut state) as usize % bytes.len();
                bytes[at] = random(&mut state) as u8;
            }
            bytes
        };
        for what in ["corpus", "mutated", "random"] {
            if std::env::args().nth(4).is_some_and(|w| w != what) {
                continue;
            }
            let start = Instant::now();
            let c0 = cpu();
            let mut count = 0u64;
            let mut st = seed;
            'out: loop {
                match what {
                    "corpus" => {
                        for bytes in &corpus {
                            target(bytes);
                            count += 1;
                        }
                    }
                    "mutated" => {
                        for _ in 0..16 {
                            target(&mutate(&corpus));
                            count += 1;
                        }
                    }
                    _ => {
                        for _ in 0..16 {
                            let len = random(&mut st) % 1024;
                            let bytes: Vec<u8> = (0..len).map(|_| random(&mut st) as u8).collect();
                            target(&bytes);
                            count += 1;
                        }
                    }
                }
                if start.elapsed().as_secs_f64() > seconds {
                    break 'out;
                }
            }
            println!(
                "{name} {what}: {:.0} inputs/s wall, {:.0} per CPU second",
                count as f64 / start.elapsed().as_secs_f64(),
                count as f64 / (cpu() - c0)
            );
        }
    }
}
