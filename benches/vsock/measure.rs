//! The measured window: counters before and after it, and the results that follow from the difference.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read};
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use nix::time::{ClockId, clock_gettime};

use crate::daemon::Daemon;
use crate::ring::Notifications;
use crate::shared::{Counts, Shared};

/// The results of one run by key.
pub type Sample = BTreeMap<&'static str, f64>;

/// The keys of results. Each names its unit.
#[allow(missing_docs)]
pub mod key {
    pub const MIB_PER_S: &str = "mib_per_s";
    pub const TO_HOST_MIB_PER_S: &str = "to_host_mib_per_s";
    pub const TO_GUEST_MIB_PER_S: &str = "to_guest_mib_per_s";
    pub const OPS_PER_S: &str = "ops_per_s";
    pub const P50_US: &str = "p50_us";
    pub const P99_US: &str = "p99_us";
    pub const WORST_US: &str = "worst_us";
    pub const US_PER_OP: &str = "us_per_op";
    pub const OUT_ALONE_MIB_PER_S: &str = "out_alone_mib_per_s";
    pub const IN_ALONE_MIB_PER_S: &str = "in_alone_mib_per_s";
    pub const KEPT_OUT: &str = "out_kept_of_alone";
    pub const KEPT_IN: &str = "in_kept_of_alone";
    pub const KEPT: &str = "least_kept_of_alone";
    pub const STILL_P50_MS: &str = "stand_still_p50_ms";
    pub const STILL_WORST_MS: &str = "stand_still_worst_ms";
    pub const PAUSE_P50_MS: &str = "undisturbed_p50_ms";
    pub const PAUSE_WORST_MS: &str = "undisturbed_worst_ms";
    pub const TOOK_P50_MS: &str = "hand_over_took_p50_ms";
    pub const TOOK_WORST_MS: &str = "hand_over_took_worst_ms";
    pub const FAIRNESS: &str = "slowest_over_fastest";
    pub const CPU_S_PER_GIB: &str = "cpu_s_per_gib";
    pub const CPU_US_PER_OP: &str = "cpu_us_per_op";
    pub const OTHERS_CPU_S_PER_GIB: &str = "guest_and_host_cpu_s_per_gib";
    pub const OTHERS_CPU_US_PER_OP: &str = "guest_and_host_cpu_us_per_op";
    pub const KICKS_PER_MIB: &str = "kicks_per_mib";
    pub const KICKS_PER_OP: &str = "kicks_per_op";
    pub const INTERRUPTS_PER_MIB: &str = "interrupts_per_mib";
    pub const INTERRUPTS_PER_OP: &str = "interrupts_per_op";
    pub const SYSCALLS_PER_MIB: &str = "syscalls_per_mib";
    pub const SYSCALLS_PER_OP: &str = "syscalls_per_op";
    pub const ANON_KIB: &str = "anon_kib";
    pub const RSS_KIB: &str = "rss_kib";
    pub const ANON_KIB_LEFT: &str = "anon_kib_left";
    pub const ANON_KIB_PER_CONN: &str = "anon_kib_per_conn";
    pub const RSS_KIB_PER_CONN: &str = "rss_kib_per_conn";
    pub const CPU_US_PER_S: &str = "cpu_us_per_s";
    pub const FLOOD_PER_S: &str = "flood_per_s";
    pub const FLOOD_ANSWERED: &str = "flood_answered_of_sent";
    pub const DAEMON_CPUS: &str = "daemon_cpus";
    pub const FOREIGN_CPUS: &str = "foreign_cpus";
    pub const START_UP_MS: &str = "start_up_ms";
}

/// The length of a run.
#[derive(Clone, Copy, Debug)]
pub struct Timing {
    /// Traffic before the window opens.
    pub warm_up: Duration,
    /// The measured window.
    pub window: Duration,
}

const CHECK: Duration = Duration::from_millis(20);
/// How often a measurement that lasts until something is done checks whether it is.
const DONE_CHECK: Duration = Duration::from_millis(1);
/// After so long without a byte, traffic has stalled.
const STALL: Duration = Duration::from_secs(1);
/// A mebibyte in bytes.
pub const MIB: f64 = 1024.0 * 1024.0;
/// A gibibyte in bytes.
pub const GIB: f64 = 1024.0 * MIB;

/// What happened in a window.
pub struct Window {
    seconds: f64,
    counts: Counts,
    cpu_seconds: f64,
    others_cpu_seconds: f64,
    busy_seconds: f64,
    kicks: f64,
    interrupts: f64,
    syscalls: Option<f64>,
}

/// A daemon with traffic, to be measured.
pub struct Probe<'a> {
    /// The daemon.
    pub daemon: &'a mut Daemon,
    /// The state of the run.
    pub shared: &'a Shared,
    /// The guest's kicks and interrupts.
    pub notifications: &'a Notifications,
    /// How long the traffic may take to begin.
    pub timeout: Duration,
}

struct Snapshot {
    at: Instant,
    counts: Counts,
    cpu: Duration,
    others_cpu: Duration,
    busy_ticks: u64,
    kicks: u64,
    interrupts: u64,
}

impl Probe<'_> {
    /// Waits for the traffic, lets it warm up, and measures it. With `syscalls`, `perf` counts them meanwhile.
    pub fn window(&mut self, timing: &Timing, syscalls: bool) -> Result<Window, String> {
        self.wait_for_traffic()?;
        self.sleep(timing.warm_up)?;
        self.shared.open_window();
        let (before, after, syscalls) = if syscalls {
            self.count_syscalls(timing.window)?
        } else {
            let before = self.snapshot()?;
            self.sleep(timing.window)?;
            (before, self.snapshot()?, None)
        };
        self.shared.close_window();
        Ok(Window::between(&before, &after, syscalls))
    }

    /// Measures from now until `done`.
    pub fn until(&mut self, done: impl Fn(Counts) -> bool) -> Result<Window, String> {
        let before = self.snapshot()?;
        self.wait(DONE_CHECK, done)?;
        Ok(Window::between(&before, &self.snapshot()?, None))
    }

    /// Waits until the traffic has begun.
    pub fn wait_for_traffic(&mut self) -> Result<(), String> {
        self.wait_for(Counts::moved)
    }

    /// Waits until enough of the traffic has begun.
    pub fn wait_for(&mut self, enough: impl Fn(Counts) -> bool) -> Result<(), String> {
        self.wait(CHECK, enough)
    }

    fn wait(&mut self, check: Duration, enough: impl Fn(Counts) -> bool) -> Result<(), String> {
        let begin = Instant::now();
        while !enough(self.shared.counts()) {
            if begin.elapsed() > self.timeout {
                let moved = self.shared.counts().moved();
                return Err(if moved {
                    "too little traffic"
                } else {
                    "no traffic"
                }
                .into());
            }
            self.sleep(check)?;
        }
        Ok(())
    }

    /// Fails if the traffic does not go on.
    pub fn check_going_on(&mut self) -> Result<(), String> {
        let before = self.shared.counts();
        let begin = Instant::now();
        while !self.shared.counts().since(before).moved() {
            if begin.elapsed() > STALL {
                return Err("the traffic has stalled".into());
            }
            self.sleep(CHECK)?;
        }
        Ok(())
    }

    /// Sleeps; returns at once if the daemon ends or a thread fails.
    pub fn sleep(&mut self, time: Duration) -> Result<(), String> {
        let end = Instant::now() + time;
        while let Some(left) = end.checked_duration_since(Instant::now()) {
            sleep(left.min(CHECK));
            // In this order, since a thread fails when the daemon ends.
            self.daemon.check().map_err(|error| error.to_string())?;
            if let Some(failure) = self.shared.failure() {
                return Err(failure);
            }
        }
        Ok(())
    }

    fn snapshot(&self) -> Result<Snapshot, String> {
        let (kicks, interrupts) = self.notifications.counts();
        Ok(Snapshot {
            at: Instant::now(),
            counts: self.shared.counts(),
            cpu: self.daemon.cpu().map_err(|error| error.to_string())?,
            others_cpu: own_cpu().map_err(|error| error.to_string())?,
            busy_ticks: busy_ticks(),
            kicks,
            interrupts,
        })
    }

    fn count_syscalls(&self, time: Duration) -> Result<(Snapshot, Snapshot, Option<f64>), String> {
        // perf counts from the start of the shell to its end: its two lines mark both.
        let script = format!("echo; sleep {}; echo", time.as_secs_f64());
        let pids: Vec<String> = self.daemon.pids().map(|pid| pid.to_string()).collect();
        let mut perf = Command::new("perf")
            .args(["stat", "-x,", "-e", SYSCALL_EVENT, "-p"])
            .arg(pids.join(","))
            .args(["--", "sh", "-c", &script])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|error| format!("perf: {error}"))?;
        let mut lines = perf.stdout.take().map(|out| BufReader::new(out).lines());
        let mut line = || lines.as_mut().and_then(Iterator::next);
        line();
        let before = self.snapshot()?;
        line();
        let after = self.snapshot()?;
        let mut report = String::new();
        if let Some(mut stderr) = perf.stderr.take() {
            let _ = stderr.read_to_string(&mut report);
        }
        let _ = perf.wait();
        let count = report
            .lines()
            .find(|line| line.contains(SYSCALL_EVENT))
            .and_then(|line| line.split(',').next()?.parse().ok());
        Ok((before, after, count))
    }
}

/// The CPU time of this process, that is, of the guest and the host programs.
pub fn own_cpu() -> nix::Result<Duration> {
    clock_gettime(ClockId::CLOCK_PROCESS_CPUTIME_ID).map(Duration::from)
}

const SYSCALL_EVENT: &str = "raw_syscalls:sys_enter";

/// Whether `perf` can count system calls here.
pub fn can_count_syscalls() -> bool {
    Command::new("perf")
        .args(["stat", "-x,", "-e", SYSCALL_EVENT, "true"])
        .stdout(Stdio::null())
        .output()
        .is_ok_and(|output| {
            let report = String::from_utf8_lossy(&output.stderr).into_owned();
            report.starts_with(|c: char| c.is_ascii_digit())
        })
}

/// How long the machine's CPUs have been busy, in ticks; 0 where /proc/stat can't be read.
fn busy_ticks() -> u64 {
    let stat = std::fs::read_to_string("/proc/stat").unwrap_or_default();
    let fields = stat
        .split_whitespace()
        .skip(1)
        .map_while(|field| field.parse::<u64>().ok());
    // user nice system idle iowait irq softirq steal: all but idle and iowait.
    fields
        .take(8)
        .enumerate()
        .filter(|(i, _)| !matches!(i, 3 | 4))
        .map(|(_, ticks)| ticks)
        .sum()
}

/// USER_HZ, the unit of /proc/stat.
const TICKS_PER_SECOND: f64 = 100.0;

impl Window {
    fn between(before: &Snapshot, after: &Snapshot, syscalls: Option<f64>) -> Self {
        Self {
            seconds: (after.at - before.at).as_secs_f64(),
            counts: after.counts.since(before.counts),
            cpu_seconds: (after.cpu - before.cpu).as_secs_f64(),
            others_cpu_seconds: (after.others_cpu - before.others_cpu).as_secs_f64(),
            busy_seconds: (after.busy_ticks - before.busy_ticks) as f64 / TICKS_PER_SECOND,
            kicks: (after.kicks - before.kicks) as f64,
            interrupts: (after.interrupts - before.interrupts) as f64,
            syscalls,
        }
    }

    /// How many CPUs other programs kept busy.
    fn foreign_cpus(&self) -> (&'static str, f64) {
        let foreign = self.busy_seconds - self.cpu_seconds - self.others_cpu_seconds;
        (key::FOREIGN_CPUS, (foreign / self.seconds).max(0.0))
    }

    fn check_moved(&self) -> Result<(), String> {
        if self.counts.moved() {
            Ok(())
        } else {
            Err("stalled".into())
        }
    }

    /// Results per byte, for streams. Fails if they have stalled.
    pub fn per_byte(&self) -> Result<Sample, String> {
        self.check_moved()?;
        let bytes = self.counts.bytes() as f64;
        let (mib, gib) = (bytes / MIB, bytes / GIB);
        let mut sample = Sample::from([
            self.foreign_cpus(),
            (key::MIB_PER_S, mib / self.seconds),
            (key::CPU_S_PER_GIB, self.cpu_seconds / gib),
            (key::OTHERS_CPU_S_PER_GIB, self.others_cpu_seconds / gib),
            (key::KICKS_PER_MIB, self.kicks / mib),
            (key::INTERRUPTS_PER_MIB, self.interrupts / mib),
        ]);
        sample.extend(
            self.syscalls
                .map(|count| (key::SYSCALLS_PER_MIB, count / mib)),
        );
        Ok(sample)
    }

    /// The throughput of each direction.
    pub fn per_direction(&self) -> Sample {
        let mib_per_s = |bytes: u64| bytes as f64 / MIB / self.seconds;
        Sample::from([
            (key::TO_HOST_MIB_PER_S, mib_per_s(self.counts.to_host)),
            (key::TO_GUEST_MIB_PER_S, mib_per_s(self.counts.to_guest)),
        ])
    }

    /// Results per second, for traffic that may stall beside other traffic.
    pub fn per_second(&self) -> Sample {
        let counts = self.counts;
        let mut sample = Sample::from([
            self.foreign_cpus(),
            (key::MIB_PER_S, counts.bytes() as f64 / MIB / self.seconds),
            (key::OPS_PER_S, counts.ops as f64 / self.seconds),
            (key::DAEMON_CPUS, self.cpu_seconds / self.seconds),
        ]);
        if counts.flood_ops > 0 {
            sample.insert(key::FLOOD_PER_S, counts.flood_ops as f64 / self.seconds);
        }
        sample
    }

    /// How many of a flood's REQUESTs were answered, from 0 to 1.
    pub fn flood_answered(&self) -> f64 {
        self.counts.flood_answers as f64 / self.counts.flood_ops as f64
    }

    /// Results per operation. Fails if traffic has stalled.
    pub fn per_op(&self) -> Result<Sample, String> {
        self.check_moved()?;
        let ops = self.counts.ops as f64;
        let mut sample = Sample::from([
            self.foreign_cpus(),
            (key::OPS_PER_S, ops / self.seconds),
            (key::CPU_US_PER_OP, self.cpu_seconds * 1e6 / ops),
            (
                key::OTHERS_CPU_US_PER_OP,
                self.others_cpu_seconds * 1e6 / ops,
            ),
            (key::KICKS_PER_OP, self.kicks / ops),
            (key::INTERRUPTS_PER_OP, self.interrupts / ops),
        ]);
        sample.extend(
            self.syscalls
                .map(|count| (key::SYSCALLS_PER_OP, count / ops)),
        );
        Ok(sample)
    }
}

/// p50 and p99 of latencies in nanoseconds, in microseconds.
pub fn percentiles(latencies: &mut [u64]) -> Sample {
    latencies.sort_unstable();
    let at = |share: f64| {
        let last = latencies.len().saturating_sub(1);
        let index = (last as f64 * share).round() as usize;
        latencies.get(index).map(|&ns| ns as f64 / 1e3)
    };
    let both = [(key::P50_US, at(0.50)), (key::P99_US, at(0.99))];
    both.into_iter()
        .filter_map(|(key, value)| Some((key, value?)))
        .collect()
}

/// Keeps the count of system calls: perf disturbs all other results.
pub fn only_syscalls(mut sample: Sample) -> Sample {
    sample.retain(|&key, _| key == key::SYSCALLS_PER_MIB || key == key::SYSCALLS_PER_OP);
    sample
}
