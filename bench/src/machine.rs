//! What a result needs to know of the machine that it was measured on.

use std::fs;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::Serialize;

/// The machine.
#[derive(Clone, Debug, Serialize)]
pub struct Machine {
    /// Processor as the kernel names it.
    pub cpu: String,
    /// Processors this process may use.
    pub cpus: usize,
    /// Main memory, MiB.
    pub memory_mib: u64,
    /// Kernel release.
    pub kernel: String,
    /// File system and device below the scratch directory.
    pub disk: String,
    /// Load average of the last minute when the benchmark began: who else was at work.
    pub load: String,
    /// When it began, seconds since 1970.
    pub began: u64,
}

impl Machine {
    /// Looks at this machine; what cannot be found out is empty.
    pub fn look(scratch: &Path) -> Machine {
        let read = |path| fs::read_to_string(path).unwrap_or_default();
        let field = |text: &str, name: &str| {
            text.lines()
                .find_map(|line| line.strip_prefix(name)?.split_once(':'))
                .map(|(_, value)| value.trim().to_owned())
                .unwrap_or_default()
        };
        let memory = field(&read("/proc/meminfo"), "MemTotal");
        let memory_kib: u64 = memory.trim_end_matches(" kB").parse().unwrap_or(0);
        Machine {
            cpu: field(&read("/proc/cpuinfo"), "model name"),
            cpus: std::thread::available_parallelism().map_or(1, usize::from),
            memory_mib: memory_kib / 1024,
            kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
            disk: disk(&read("/proc/self/mounts"), scratch),
            load: read("/proc/loadavg")
                .split(' ')
                .next()
                .unwrap_or_default()
                .to_owned(),
            began: SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .map_or(0, |since| since.as_secs()),
        }
    }
}

/// The mount with the longest path above `dir`, as `type on device`.
fn disk(mounts: &str, dir: &Path) -> String {
    let dir = dir.canonicalize().unwrap_or_else(|_| dir.to_owned());
    mounts
        .lines()
        .filter_map(|line| {
            let mut words = line.split(' ');
            let (device, at, kind) = (words.next()?, words.next()?, words.next()?);
            dir.starts_with(at)
                .then(|| (at.len(), format!("{kind} on {device}")))
        })
        .max_by_key(|(len, _)| *len)
        .map(|(_, name)| name)
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_deepest_mount_above_the_directory_counts() {
        let mounts =
            "/dev/a / ext4 rw 0 0\n/dev/b /var xfs rw 0 0\n/dev/c /var/lib/x btrfs rw 0 0\n";
        assert_eq!(disk(mounts, Path::new("/var/lib")), "xfs on /dev/b");
        assert_eq!(disk(mounts, Path::new("/varnish")), "ext4 on /dev/a");
    }
}
