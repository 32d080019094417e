//! `ucx_perftest` as a yardstick: two processes on the processors that our two sides have.

use std::process::Command;

use crate::Failure;
use crate::ends::processors;
use crate::programs::{self, Served};

/// A test of UCX.
pub struct Ucx {
    /// What may carry it (`UCX_TLS`).
    pub transports: &'static str,
    /// The test's name.
    pub test: &'static str,
    /// Bytes of a message.
    pub len: usize,
    /// Messages, after a tenth as many to warm up.
    pub iterations: usize,
}

/// What it printed.
pub struct Figures {
    /// Median of a message's way, one way, microseconds.
    pub latency_us: f64,
}

/// Checks that it is installed.
///
/// # Errors
/// [`Failure::NoYardstick`].
pub fn require() -> Result<(), Failure> {
    programs::require("ucx_perftest", "ucx-utils")
}

impl Ucx {
    /// Runs the test once.
    ///
    /// # Errors
    /// It fails, or prints something else.
    pub fn run(&self) -> Result<Figures, Failure> {
        let port = programs::free_port()?;
        let of_port = port.to_string();
        let [first, last] = processors()?.map(|cpu| cpu.to_string());
        let mut server = self.command();
        server.args(["-p", &of_port, "-c", &last]);
        let _server = Served::start(&mut server, port)?;
        let (iterations, warm_up) = (self.iterations, self.iterations / 10);
        let mut client = self.command();
        client
            .args(["127.0.0.1", "-f", "-p", &of_port, "-c", &first])
            .args(["-t", self.test, "-s", &self.len.to_string()])
            .args(["-n", &iterations.to_string(), "-w", &warm_up.to_string()]);
        let text = programs::ask(&mut client)?;
        figures(&text, iterations)
            .ok_or_else(|| Failure::Broken(format!("ucx_perftest printed:\n{text}")))
    }

    fn command(&self) -> Command {
        let mut command = Command::new("ucx_perftest");
        command
            .env("UCX_TLS", self.transports)
            .env("UCX_NET_DEVICES", "lo");
        command
    }
}

/// The line that begins with the number of iterations: then the median, and more.
fn figures(text: &str, iterations: usize) -> Option<Figures> {
    let iterations = iterations.to_string();
    text.lines().rev().find_map(|line| {
        let mut words = line.split_whitespace();
        (words.next() == Some(iterations.as_str())).then_some(())?;
        let numbers: Vec<f64> = words.map_while(|word| word.parse().ok()).collect();
        numbers.first().map(|median| Figures {
            latency_us: *median,
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_line_has_the_figures() {
        let text = "\
+----+\n|    |     latency (usec)     |\n\
                       20000      5.432     5.785     5.785       10.55      10.51      172868      172868\n";
        let found = figures(text, 20_000).unwrap();
        assert_eq!(found.latency_us, 5.432);
        assert!(figures(text, 10_000).is_none());
    }
}
