//! The measured window: what is looked at before and after it, and what follows from the difference.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read};
use std::process::{Command, Stdio};
use std::sync::atomic::Ordering;
use std::thread::sleep;
use std::time::{Duration, Instant};

use nix::time::{ClockId, clock_gettime};

use crate::daemon::Daemon;
use crate::guest::notifications;
use crate::ring::Notifications;
use crate::shared::Shared;

/// One run's results by their keys.
pub type Sample = BTreeMap<&'static str, f64>;

/// The keys of results; each names its unit.
#[allow(missing_docs)] // The names say it.
pub mod key {
    pub const MIB_PER_S: &str = "mib_per_s";
    pub const OPS_PER_S: &str = "ops_per_s";
    pub const P50_US: &str = "p50_us";
    pub const P99_US: &str = "p99_us";
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
    pub const ANON_KIB_PER_CONN: &str = "anon_kib_per_conn";
    pub const RSS_KIB_PER_CONN: &str = "rss_kib_per_conn";
    pub const CPU_US_PER_S: &str = "cpu_us_per_s";
    pub const FOREIGN_CPUS: &str = "foreign_cpus";
    pub const START_UP_MS: &str = "start_up_ms";
}

/// How long a run is.
#[derive(Clone, Copy, Debug)]
pub struct Timing {
    /// Traffic before the window opens.
    pub warm_up: Duration,
    /// The window.
    pub window: Duration,
}

const CHECK: Duration = Duration::from_millis(20);
const MIB: f64 = 1024.0 * 1024.0;
const GIB: f64 = 1024.0 * MIB;

/// What happened in a window.
pub struct Window {
    seconds: f64,
    bytes: f64,
    ops: f64,
    cpu_seconds: f64,
    others_cpu_seconds: f64,
    busy_seconds: f64,
    kicks: f64,
    interrupts: f64,
    syscalls: Option<f64>,
}

/// What is measured: a daemon with traffic.
pub struct Probe<'a> {
    /// The daemon.
    pub daemon: &'a mut Daemon,
    /// The threads with the traffic.
    pub shared: &'a Shared,
    /// The guest's kicks and interrupts.
    pub notifications: &'a Notifications,
    /// How long the traffic may take to begin.
    pub patience: Duration,
}

struct Look {
    at: Instant,
    bytes: u64,
    ops: u64,
    cpu: Duration,
    others_cpu: Duration,
    busy_ticks: u64,
    kicks: u64,
    interrupts: u64,
}

impl Probe<'_> {
    /// Waits for the traffic, lets it warm up, and measures. With `syscalls`, `perf` counts them meanwhile.
    pub fn window(&mut self, timing: &Timing, syscalls: bool) -> Result<Window, String> {
        self.wait_for_traffic()?;
        self.pass(timing.warm_up)?;
        self.shared.measuring.store(true, Ordering::Relaxed);
        let (before, after, syscalls) = if syscalls {
            self.count_syscalls(timing.window)?
        } else {
            let before = self.look()?;
            self.pass(timing.window)?;
            (before, self.look()?, None)
        };
        self.shared.measuring.store(false, Ordering::Relaxed);
        let window = Window {
            seconds: (after.at - before.at).as_secs_f64(),
            bytes: (after.bytes - before.bytes) as f64,
            ops: (after.ops - before.ops) as f64,
            cpu_seconds: (after.cpu - before.cpu).as_secs_f64(),
            others_cpu_seconds: (after.others_cpu - before.others_cpu).as_secs_f64(),
            busy_seconds: (after.busy_ticks - before.busy_ticks) as f64 / TICKS_PER_SECOND,
            kicks: (after.kicks - before.kicks) as f64,
            interrupts: (after.interrupts - before.interrupts) as f64,
            syscalls,
        };
        if window.bytes + window.ops == 0.0 {
            return Err("stalled".into());
        }
        Ok(window)
    }

    fn wait_for_traffic(&mut self) -> Result<(), String> {
        let begin = Instant::now();
        let shared = self.shared;
        while shared.bytes.load(Ordering::Relaxed) + shared.ops.load(Ordering::Relaxed) == 0 {
            if begin.elapsed() > self.patience {
                return Err("nothing moves".into());
            }
            self.pass(CHECK)?;
        }
        Ok(())
    }

    /// Sleeps, unless something goes wrong.
    fn pass(&mut self, time: Duration) -> Result<(), String> {
        let end = Instant::now() + time;
        while let Some(left) = end.checked_duration_since(Instant::now()) {
            sleep(left.min(CHECK));
            // A daemon that ended is the better explanation of the two.
            self.daemon.check().map_err(|error| error.to_string())?;
            if let Some(failure) = self.shared.failure() {
                return Err(failure);
            }
        }
        Ok(())
    }

    fn look(&self) -> Result<Look, String> {
        let (kicks, interrupts) = notifications(self.notifications);
        Ok(Look {
            at: Instant::now(),
            bytes: self.shared.bytes.load(Ordering::Relaxed),
            ops: self.shared.ops.load(Ordering::Relaxed),
            cpu: self.daemon.cpu().map_err(|error| error.to_string())?,
            others_cpu: own_cpu().map_err(|error| error.to_string())?,
            busy_ticks: busy_ticks(),
            kicks,
            interrupts,
        })
    }

    fn count_syscalls(&self, time: Duration) -> Result<(Look, Look, Option<f64>), String> {
        // perf starts to count just before the shell starts, and stops when it ends.
        let script = format!("echo; sleep {}; echo", time.as_secs_f64());
        let mut perf = Command::new("perf")
            .args(["stat", "-x,", "-e", SYSCALL_EVENT, "-p"])
            .arg(self.daemon.pid().to_string())
            .args(["--", "sh", "-c", &script])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|error| format!("perf: {error}"))?;
        let mut lines = perf.stdout.take().map(|out| BufReader::new(out).lines());
        let mut line = || lines.as_mut().and_then(Iterator::next);
        line();
        let before = self.look()?;
        line();
        let after = self.look()?;
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

/// The processor time of this process: the guest and the host programs together.
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

/// The ticks in which the machine's processors had something to do; 0 where they are not told.
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

/// The unit of /proc/stat, on every Linux machine of today.
const TICKS_PER_SECOND: f64 = 100.0;

impl Window {
    /// How many processors other programs kept busy meanwhile.
    fn foreign_cpus(&self) -> (&'static str, f64) {
        let foreign = self.busy_seconds - self.cpu_seconds - self.others_cpu_seconds;
        (key::FOREIGN_CPUS, (foreign / self.seconds).max(0.0))
    }

    /// Results per byte, for streams.
    pub fn per_byte(&self) -> Sample {
        let (mib, gib) = (self.bytes / MIB, self.bytes / GIB);
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
                .map(|calls| (key::SYSCALLS_PER_MIB, calls / mib)),
        );
        sample
    }

    /// Results per operation.
    pub fn per_op(&self) -> Sample {
        let mut sample = Sample::from([
            self.foreign_cpus(),
            (key::OPS_PER_S, self.ops / self.seconds),
            (key::CPU_US_PER_OP, self.cpu_seconds * 1e6 / self.ops),
            (
                key::OTHERS_CPU_US_PER_OP,
                self.others_cpu_seconds * 1e6 / self.ops,
            ),
            (key::KICKS_PER_OP, self.kicks / self.ops),
            (key::INTERRUPTS_PER_OP, self.interrupts / self.ops),
        ]);
        sample.extend(
            self.syscalls
                .map(|calls| (key::SYSCALLS_PER_OP, calls / self.ops)),
        );
        sample
    }
}

/// p50 and p99 in microseconds, of latencies in nanoseconds.
pub fn percentiles(latencies: &mut [u64]) -> Sample {
    latencies.sort_unstable();
    let at = |share: f64| {
        let last = latencies.len().saturating_sub(1);
        let place = (last as f64 * share).round() as usize;
        latencies.get(place).map(|&ns| ns as f64 / 1e3)
    };
    let both = [(key::P50_US, at(0.50)), (key::P99_US, at(0.99))];
    both.into_iter()
        .filter_map(|(key, value)| Some((key, value?)))
        .collect()
}

/// What a run may say in which system calls were counted.
pub fn only_syscalls(mut sample: Sample) -> Sample {
    sample.retain(|&key, _| key == key::SYSCALLS_PER_MIB || key == key::SYSCALLS_PER_OP);
    sample
}
