//! The command as its users meet it: real processes on loopback addresses.

mod common;

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use common::{check, diff, lowtide, make_input, processes, start_staying, text, wait_until};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};
use serde_json::Value;

#[test]
fn a_killed_server_is_restarted_and_everything_is_there() {
    let tmp = tempfile::tempdir().unwrap();
    let (input, state, out) = (
        tmp.path().join("in"),
        tmp.path().join("state"),
        tmp.path().join("out"),
    );
    make_input(&input, 300);
    let report_file = tmp.path().join("report.json");
    let output = lowtide(&["run", "--clients", "1", "--fault", "kill:meta1@40%"])
        .args(["--input", text(&input), "--state", text(&state)])
        .args(["--report", text(&report_file)])
        .output()
        .unwrap();
    check(&output, 0);
    let report: Value = serde_json::from_slice(&fs::read(&report_file).unwrap()).unwrap();
    assert_eq!(report["verified"], true);
    assert_eq!(report["mismatches"], 0);
    // 300 files, 10 directories, and the six others with the top.
    assert_eq!(report["entries"], 315);
    assert!(report["operations"].as_u64().unwrap() >= 300);
    check_report(&report);
    assert_eq!(report["faults"][0]["spec"], "kill:meta1@40%");
    assert!(report["faults"][0]["detected_ms"].is_u64());
    assert!(report["faults"][0]["recovered_ms"].is_u64());
    assert_eq!(report["nodes"]["meta1"]["lives"], 2);
    assert_eq!(report["nodes"]["meta0"]["lives"], 1);
    assert_eq!(report["minimum"]["final_lag"], 0);
    for process in ["meta1", "supervisor"] {
        assert!(report["memory"][process]["rss_anon"].as_u64().unwrap() > 0);
    }
    assert!(processes(&state).is_empty());

    check(
        &lowtide(&["export", "--state", text(&state), "--to", text(&out)])
            .output()
            .unwrap(),
        0,
    );
    diff(&input, &out);
    let verified = lowtide(&["verify", "--state", text(&state)])
        .output()
        .unwrap();
    check(&verified, 0);
    let said = String::from_utf8_lossy(&verified.stdout);
    // The root and 312 others; 314 names besides the root's.
    assert!(said.contains("checked   314 inodes, 314 entries"), "{said}");
    for node in ["meta0", "object1"] {
        let data = state.join(node).join("data");
        let output = lowtide(&["log", "--verify", text(&data)]).output().unwrap();
        check(&output, 0);
        assert!(String::from_utf8_lossy(&output.stdout).contains("intact up to byte"));
        let output = lowtide(&["log", text(&data)]).output().unwrap();
        check(&output, 0);
        let printed = String::from_utf8_lossy(&output.stdout);
        assert!(
            printed.lines().any(|line| line.contains(" lsn ")),
            "{printed}"
        );
    }
    // The state is somebody's work now; another run must not touch it.
    let again = lowtide(&["run", "--input", text(&input), "--state", text(&state)])
        .output()
        .unwrap();
    check(&again, 2);
    assert!(String::from_utf8_lossy(&again.stderr).contains("not empty"));
}

/// Every key that programs rely on, with its type and a value that can be.
fn check_report(report: &Value) {
    let number = |path: &str| {
        let value = report.pointer(path);
        let value = value.unwrap_or_else(|| panic!("{path} is missing"));
        value
            .as_u64()
            .unwrap_or_else(|| panic!("{path} is {value}"))
    };
    assert!(report["verified"].is_boolean());
    assert_eq!(report["provider"], "softroce");
    assert!(number("/entries") > 0);
    // 3 MiB are the large file alone, counted once although it has two names or twice.
    assert!(number("/bytes") >= 3 << 20);
    assert!(number("/operations") >= number("/entries") / 2);
    assert_eq!(number("/mismatches") + number("/partial_operations"), 0);
    let (seconds, rate) = (&report["elapsed_s"], &report["ops_per_s"]);
    let (seconds, rate) = (seconds.as_f64().unwrap(), rate.as_f64().unwrap());
    assert!(seconds > 0.0 && rate > 0.0);
    assert!((seconds * rate - number("/operations") as f64).abs() < 1.0);
    for (index, fault) in report["faults"].as_array().unwrap().iter().enumerate() {
        assert!(fault["spec"].is_string());
        for key in ["in_flight", "replayed", "completed", "undone"] {
            number(&format!("/faults/{index}/{key}"));
        }
        let recovered = number(&format!("/faults/{index}/recovered_ms"));
        assert!(
            fault["detected_ms"]
                .as_u64()
                .is_none_or(|ms| ms <= recovered)
        );
    }
    assert_eq!(number("/minimum/final_lag"), 0);
    assert!(number("/minimum/max_lag_ms") < 120_000);
    assert!(number("/windows/sent") >= number("/windows/discarded"));
    assert!(number("/windows/held_max") >= 1);
    assert!(number("/undo/appended") >= number("/operations"));
    assert!(number("/undo/appended") >= number("/undo/rolled_back"));
    // What the next life of a killed server lets go, its last one had appended.
    assert!(number("/undo/purged") > 0);
    let latency = ["p50", "p99", "p999"].map(|key| number(&format!("/latency_us/{key}")));
    assert!(latency[0] > 0 && latency.is_sorted(), "{latency:?}");
}

/// Runs with these faults and returns the report of a run that succeeded.
fn run_with(faults: &[&str], files: u32) -> Value {
    run_as("auto", faults, files)
}

/// The same on a provider.
fn run_as(provider: &str, faults: &[&str], files: u32) -> Value {
    let tmp = tempfile::tempdir().unwrap();
    let input = tmp.path().join("in");
    make_input(&input, files);
    let report = tmp.path().join("report.json");
    let mut run = lowtide(&["run", "--patience", "30", "--provider", provider]);
    run.args(["--input", text(&input)]);
    run.args(["--report", text(&report)]);
    for fault in faults {
        run.args(["--fault", fault]);
    }
    check(&run.output().unwrap(), 0);
    let report: Value = serde_json::from_slice(&fs::read(&report).unwrap()).unwrap();
    let specs: Vec<&str> = report["faults"]
        .as_array()
        .unwrap()
        .iter()
        .map(|fault| fault["spec"].as_str().unwrap())
        .collect();
    assert_eq!(specs.len(), faults.len());
    assert!(
        faults.iter().all(|fault| specs.contains(fault)),
        "{specs:?}"
    );
    report
}

/// Each source has its share of every log, so the logs must grow before anything is stored.
#[test]
fn many_clients_and_proxies_have_room_from_the_start() {
    let tmp = tempfile::tempdir().unwrap();
    let (input, report) = (tmp.path().join("in"), tmp.path().join("report.json"));
    make_input(&input, 60);
    let mut run = lowtide(&["run", "--clients", "7", "--proxy", "3"]);
    run.args(["--input", text(&input), "--report", text(&report)]);
    check(&run.output().unwrap(), 0);
    let report: Value = serde_json::from_slice(&fs::read(&report).unwrap()).unwrap();
    assert_eq!(report["nodes"].as_object().unwrap().len(), 1 + 4 + 3 + 7);
}

#[test]
fn another_client_finishes_the_work_of_one_that_never_returns() {
    let report = run_with(&["kill:client1@20%!"], 400);
    assert_eq!(report["entries"], 415);
    assert_eq!(report["nodes"]["client1"]["lives"], 1);
    assert!(report["faults"][0]["recovered_ms"].is_u64());
}

#[test]
fn a_run_through_shared_memory_survives_a_kill_a_pause_and_a_partition() {
    let faults = [
        "pause:object0@10%:500",
        "kill:meta1@40%",
        "partition:proxy0,meta0@70%:500",
    ];
    let report = run_as("host", &faults, 300);
    assert_eq!(report["entries"], 315);
    assert_eq!(report["nodes"]["meta1"]["lives"], 2);
    // "host (N connections through shared memory, 0 by UDP)"
    let provider = report["provider"].as_str().unwrap();
    let count = provider
        .strip_prefix("host (")
        .and_then(|rest| rest.split(' ').next());
    assert!(count.unwrap().parse::<u32>().unwrap() >= 8, "{provider}");
    assert!(
        provider.ends_with(" through shared memory, 0 by UDP)"),
        "{provider}"
    );
}

#[test]
fn a_pause_and_a_partition_evict_nobody() {
    let faults = ["pause:meta0@20%:1500", "partition:proxy0,meta1@50%:1500"];
    let report = run_with(&faults, 300);
    for fault in report["faults"].as_array().unwrap() {
        assert_eq!(fault["detected_ms"], Value::Null, "{fault}");
        assert!(fault["recovered_ms"].as_u64().unwrap() >= 1500, "{fault}");
    }
    for (name, node) in report["nodes"].as_object().unwrap() {
        assert_eq!(node["lives"], 1, "{name}");
    }
    assert_eq!(report["nodes"]["root"]["status"]["counters"]["evicted"], 0);
}

#[test]
fn power_loss_and_lost_datagrams_are_survived_together() {
    let report = run_with(&["loss:3", "poweroff:object0@50%"], 300);
    assert_eq!(report["nodes"]["object0"]["lives"], 2);
}

/// As [`run_with`], with two routers.
fn run_routed(faults: &[&str]) -> Value {
    let tmp = tempfile::tempdir().unwrap();
    let input = tmp.path().join("in");
    make_input(&input, 300);
    let mut run = lowtide(&["run", "--routers", "2", "--report", "-"]);
    run.args(["--patience", "30", "--input", text(&input)]);
    for fault in faults {
        run.args(["--fault", fault]);
    }
    let output = run.output().unwrap();
    check(&output, 0);
    // It is alone there, as a program wants it.
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    check_report(&report);
    report
}

#[test]
fn a_router_may_die_and_never_return() {
    let report = run_routed(&["kill:router0@20%", "kill:router1@40%!", "kill:root@60%"]);
    assert_eq!(report["nodes"]["router0"]["lives"], 2);
    assert_eq!(report["nodes"]["router1"]["lives"], 1);
    assert_eq!(report["nodes"]["client0"]["lives"], 1);
}

/// Below a router nobody says anything to the root: the root that returns counts whom the router
/// reports, and whoever hears its term connects to it again, as the proxy's death demands.
#[test]
fn below_routers_the_root_returns_and_a_proxy_dies() {
    let faults = ["kill:root@20%", "kill:proxy0@60%"];
    let report = run_routed(&faults);
    assert_eq!(report["nodes"]["root"]["lives"], 2);
    assert_eq!(report["nodes"]["proxy0"]["lives"], 2);
    assert_eq!(report["nodes"]["proxy1"]["lives"], 1);
    let evicted = &report["nodes"]["root"]["status"]["counters"]["evicted"];
    assert_eq!(*evicted, 1, "the proxy that died, and nobody else");
}

#[test]
fn a_fault_may_strike_while_another_one_is_recovered_from() {
    let report = run_with(&["kill:meta1@40%", "kill:meta1@40%+450"], 400);
    assert_eq!(report["nodes"]["meta1"]["lives"], 3);
}

#[test]
fn a_run_tells_how_far_it_is_and_what_recovers() {
    let tmp = tempfile::tempdir().unwrap();
    let input = tmp.path().join("in");
    make_input(&input, 400);
    // A server waits for the proxy that is away, for as long as it takes for two lines or more.
    let output = lowtide(&["run", "--fault", "pause:proxy0@30%:5000"])
        .args(["--fault", "kill:meta1@30%", "--input", text(&input)])
        .output()
        .unwrap();
    check(&output, 0);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    let line_with = |words: &[&str]| {
        let has = |line: &str| words.iter().all(|word| line.contains(word));
        assert!(said.lines().any(has), "{words:?}: {said}");
    };
    let figures = [
        "storing ",
        "%: ",
        " operations (",
        " unstable), ",
        " entries, ",
        " epoch ",
        " minimum ",
        "(lag ",
    ];
    line_with(&figures);
    line_with(&["storing ", "meta1 RECONNECT"]);
    line_with(&["storing ", "proxy0 silent", "minimum held at "]);
}

#[test]
fn on_a_terminal_a_bar_grows() {
    let tmp = tempfile::tempdir().unwrap();
    let input = tmp.path().join("in");
    make_input(&input, 200);
    let ours = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
    grantpt(&ours).unwrap();
    unlockpt(&ours).unwrap();
    let size = Winsize {
        ws_row: 40,
        ws_col: 160,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    tcsetwinsize(&ours, size).unwrap();
    let name = ptsname(&ours, Vec::new()).unwrap();
    let mut theirs = fs::File::options();
    let theirs = theirs.read(true).write(true).open(name.to_str().unwrap());
    // The only client stands still three times for longer than a picture takes, however fast the
    // machine.
    let mut run = lowtide(&["run", "--clients", "1", "--input", text(&input)])
        .args(["--fault", "pause:client0@20%:600"])
        .args(["--fault", "pause:client0@45%:600"])
        .args(["--fault", "pause:client0@70%:600"])
        .env("TERM", "xterm")
        .stderr(theirs.unwrap())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    // The terminal hangs up, an error, when the last process that has it is gone.
    let mut shown = Vec::new();
    let _ = fs::File::from(ours).read_to_end(&mut shown);
    assert_eq!(run.wait().unwrap().code(), Some(0));
    let shown = String::from_utf8_lossy(&shown).into_owned();
    let whole = "\u{2588}";
    for words in ["\u{1b}[", whole, "\u{2591}", "storing ", " epoch ", "(lag "] {
        assert!(shown.contains(words), "{words:?}: {shown:?}");
    }
    // It is as wide as its work is far.
    let widths = shown
        .split(['\r', '\n'])
        .map(|line| line.matches(whole).count());
    let widths: std::collections::BTreeSet<usize> = widths.collect();
    assert!(widths.len() > 3, "{widths:?}");
}

#[test]
fn two_runs_at_once_do_not_meet() {
    let tmp = tempfile::tempdir().unwrap();
    let input = tmp.path().join("in");
    make_input(&input, 60);
    let runs: Vec<Child> = (0..2)
        .map(|_| {
            lowtide(&["run", "--clients", "1", "--proxy", "1", "--meta", "1"])
                .args(["--input", text(&input), "--report", "-"])
                .stdout(Stdio::piped())
                .stderr(Stdio::piped())
                .spawn()
                .unwrap()
        })
        .collect();
    for run in runs {
        check(&run.wait_with_output().unwrap(), 0);
    }
}

#[test]
fn a_cluster_that_stays_serves_commands_until_it_is_told_to_end() {
    let tmp = tempfile::tempdir().unwrap();
    let (input, state) = (tmp.path().join("in"), tmp.path().join("state"));
    make_input(&input, 30);
    let mut run = start_staying(&input, &state);
    let on = |args: &[&str]| {
        let (command, rest) = args.split_first().unwrap();
        lowtide(&[command, "--state", text(&state)])
            .args(rest)
            .output()
            .unwrap()
    };
    let listed = on(&["ls", "/"]);
    check(&listed, 0);
    let listed = String::from_utf8(listed.stdout).unwrap();
    assert!(listed.lines().any(|line| line == "large"), "{listed}");
    check(&on(&["mkdir", "/new"]), 0);
    check(&on(&["put", text(&input.join("large")), "/new/copy"]), 0);
    check(&on(&["mv", "/new/copy", "/new/moved"]), 0);
    let fetched = tmp.path().join("fetched");
    check(&on(&["get", "/new/moved", text(&fetched)]), 0);
    assert_eq!(
        fs::read(&fetched).unwrap(),
        fs::read(input.join("large")).unwrap()
    );
    check(&on(&["get", "/nope", text(&tmp.path().join("x"))]), 3);

    let status = on(&["status", "--json"]);
    check(&status, 0);
    let status: Value = serde_json::from_slice(&status.stdout).unwrap();
    assert_eq!(status["root"]["status"]["stage"], "COMPLETE");
    assert_eq!(status.as_object().unwrap().len(), 8);
    for (name, node) in status.as_object().unwrap() {
        let status = &node["status"];
        assert!(name.starts_with(status["role"].as_str().unwrap()), "{name}");
        assert_eq!(status["stage"], "COMPLETE", "{name}");
        for key in ["id", "incarnation", "epoch", "minimum", "term"] {
            assert!(
                status[key].as_u64().unwrap() > 0,
                "{name}: {key} of {status}"
            );
        }
        assert!(status["minimum"].as_u64() <= status["epoch"].as_u64());
        assert!(status["counters"]["messages_sent"].as_u64().unwrap() > 0);
    }
    assert_eq!(
        status["root"]["status"]["members"]
            .as_array()
            .unwrap()
            .len(),
        7
    );
    // In use: nobody else may open it.
    let refused = on(&["export", "--to", "/nonexistent"]);
    check(&refused, 2);
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(said.contains("in use by another lowtide process"), "{said}");

    // For people: a line for each node, and with --watch again and again.
    let names: Vec<String> = status.as_object().unwrap().keys().cloned().collect();
    let is_look = |lines: &[String]| {
        let of = |name: &String| lines.iter().find(|line| line.starts_with(name.as_str()));
        names.iter().all(|name| {
            of(name).is_some_and(|line| {
                let words = [" life ", " epoch ", " minimum ", "COMPLETE"];
                words.iter().all(|word| line.contains(word))
            })
        })
    };
    let plain = on(&["status"]);
    check(&plain, 0);
    let plain = String::from_utf8(plain.stdout).unwrap();
    let lines: Vec<String> = plain.lines().map(str::to_owned).collect();
    assert!(is_look(&lines) && lines.len() == names.len() + 1, "{plain}");
    let mut watch = lowtide(&["status", "--watch", "--state", text(&state)])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(watch.stdout.take().unwrap()).lines();
    for _ in 0..2 {
        // An empty line ends a look.
        let look: Vec<String> = lines
            .by_ref()
            .map(Result::unwrap)
            .take_while(|line| !line.is_empty())
            .collect();
        assert!(is_look(&look) && look.len() == names.len(), "{look:?}");
    }
    watch.kill().unwrap();
    watch.wait().unwrap();

    let nodes = processes(&state);
    assert_eq!(nodes.len(), 8);
    let killed = Command::new("kill").arg(run.id().to_string()).status();
    assert!(killed.unwrap().success());
    assert_eq!(run.wait().unwrap().code(), Some(0));
    assert!(processes(&state).is_empty());
}

#[test]
fn nodes_die_with_their_supervisor() {
    let tmp = tempfile::tempdir().unwrap();
    let (input, state) = (tmp.path().join("in"), tmp.path().join("state"));
    make_input(&input, 10);
    let mut run = start_staying(&input, &state);
    assert_eq!(processes(&state).len(), 8);
    run.kill().unwrap();
    run.wait().unwrap();
    wait_until("nodes outlive their supervisor", || {
        processes(&state).is_empty()
    });
}

#[test]
fn an_unplanned_death_is_noticed_and_repaired() {
    let tmp = tempfile::tempdir().unwrap();
    let (input, state) = (tmp.path().join("in"), tmp.path().join("state"));
    make_input(&input, 10);
    let mut run = start_staying(&input, &state);
    let before = processes(&state);
    let victim = before
        .iter()
        .find(|pid| {
            let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap();
            String::from_utf8_lossy(&line).contains("object0")
        })
        .unwrap();
    let killed = Command::new("kill")
        .args(["-9", &victim.to_string()])
        .status();
    assert!(killed.unwrap().success());
    wait_until("the server is not restarted", || {
        let now = processes(&state);
        now.len() == before.len() && !now.contains(victim)
    });
    let copy = tmp.path().join("copy");
    let got = lowtide(&["get", "--state", text(&state), "/large", text(&copy)])
        .output()
        .unwrap();
    check(&got, 0);
    assert_eq!(fs::read(&copy).unwrap().len(), 3 << 20);
    run.kill().unwrap();
    run.wait().unwrap();
}

#[test]
fn an_interrupted_run_says_where_its_state_is() {
    let tmp = tempfile::tempdir().unwrap();
    let input = tmp.path().join("in");
    make_input(&input, 10);
    let mut run = lowtide(&["run", "--clients", "1", "--input", text(&input)])
        .args(["--fault", "pause:client0@0%:600000"])
        .env("TMPDIR", tmp.path())
        .stderr(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(run.stderr.take().unwrap()).lines();
    let struck = lines.any(|line| line.unwrap().contains("fault pause:client0@0%"));
    assert!(struck, "the pause begins");
    let killed = Command::new("kill")
        .args(["-INT", &run.id().to_string()])
        .status();
    assert!(killed.unwrap().success());
    let rest: Vec<String> = lines.map(Result::unwrap).collect();
    assert_eq!(run.wait().unwrap().code(), Some(130));
    let state = rest
        .iter()
        .find_map(|line| line.strip_prefix("state     "))
        .expect("the state is named");
    assert!(Path::new(state).join("lowtide.toml").exists());
    assert!(processes(Path::new(state)).is_empty());
}

#[test]
fn mistakes_are_usage_errors() {
    let tmp = tempfile::tempdir().unwrap();
    let bad = tmp.path().join("node.toml");
    fs::write(&bad, "version = 1\nrole = 3\n").unwrap();
    let table: [(&[&str], &str); 5] = [
        (&["run", "--fault", "kill:meta9@1%"], "meta0 to meta1"),
        (&["run", "--fault", "kill:meta0"], "the moment is missing"),
        (&["run", "--provider", "verbs"], "use softroce"),
        (
            &["node", "--config", text(&bad)],
            "node.toml:2:1: unknown field",
        ),
        (
            &["export", "--state", text(tmp.path()), "--to", "x"],
            "no lowtide state here",
        ),
    ];
    for (args, message) in table {
        let output = lowtide(args).output().unwrap();
        check(&output, 2);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(said.contains(message), "{args:?}: {said}");
    }
}

#[test]
fn a_captured_run_is_explained_packet_by_packet() {
    let tmp = tempfile::tempdir().unwrap();
    let (input, file) = (tmp.path().join("in"), tmp.path().join("run.pcap"));
    fs::create_dir(&input).unwrap();
    make_input(&input, 10);
    let captured = lowtide(&[
        "capture",
        "--to",
        text(&file),
        "--",
        "run",
        "--clients",
        "1",
    ])
    .args(["--fault", "loss:3", "--input", text(&input)])
    .output();
    check(&captured.unwrap(), 0);
    let dissect = |args: &[&str]| {
        lowtide(&["dissect"])
            .args(args)
            .arg(&file)
            .output()
            .unwrap()
    };
    let output = dissect(&["--json"]);
    check(&output, 0);
    let lines: Vec<Value> = String::from_utf8(output.stdout)
        .unwrap()
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let (sums, packets) = lines.split_last().unwrap();
    let sums = &sums["summary"];
    assert_eq!(sums["frames"], packets.len());
    assert_eq!(sums["icrc_right"], packets.len());
    for kind in ["ConnectRequest", "ConnectReply", "ReadyToUse"] {
        assert!(packets.iter().any(|p| p["mad"]["attribute"] == kind));
    }
    for name in ["RC Send Only", "RC Acknowledge"] {
        assert!(packets.iter().any(|p| p["name"] == name), "{name}");
    }

    // A damaged packet and a cut end are told, and what is before them.
    let mut bytes = fs::read(&file).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&file, &bytes).unwrap();
    let output = dissect(&[]);
    check(&output, 1);
    let all = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        all.contains("icrc WRONG") && all.contains("wrong 1,"),
        "{all}"
    );
    bytes.pop();
    fs::write(&file, &bytes).unwrap();
    let output = dissect(&[]);
    check(&output, 1);
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    let expected = format!(
        "ends in the middle of what follows frame {}",
        packets.len() - 1
    );
    assert!(error.contains(&expected), "{error}");
    fs::write(&file, "no capture").unwrap();
    check(&dissect(&[]), 2);
}
