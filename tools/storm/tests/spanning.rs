//! Clients that want single slots and a range that spans them, through two proxies and under one
//! home: the shape in which lock requests once went round in a circle for ever. Every schedule of it
//! must come to rest.

use lowtide_storm::plan::{ClientPlan, Mix, Plan};
use lowtide_storm::runner::run;
use lowtide_storm::scenario::two_by_two;

fn plan(seed: u64) -> Plan {
    let client = |proxy, ops, aggregated| ClientPlan {
        via: vec![(0, proxy)],
        ops,
        aggregated,
    };
    Plan {
        seed,
        destinations: 1,
        clients: vec![
            client(0, 3, true),
            client(1, 1, false),
            client(0, 5, true),
            client(1, 9, false),
        ],
        horizon: 425,
        delay_max: 2,
        sync_max: 6,
        ping_interval: 20,
        evict_after: 208,
        bypass_after: 105,
        merge_interval: 50,
        think_max: 10,
        depth: 5,
        slots: 2,
        wide: 0,
        multi: 90,
        mix: Mix {
            append: 2,
            blind: 6,
            add: 3,
            delete: 3,
            create: 1,
            read: 3,
            scan: 6,
        },
        ..two_by_two(0)
    }
}

#[test]
fn slots_and_the_range_that_spans_them_are_all_granted() {
    // Those after 300 stalled once, for one of two reasons.
    let stalled = [23308, 36030, 43679, 45144, 45152, 45613, 51468];
    for seed in (0..300).chain(stalled) {
        if run(&plan(seed), false).failure.is_some() {
            let report = run(&plan(seed), true);
            let last = report.trace.len().saturating_sub(200);
            println!(
                "{}\n{}",
                report.trace[last..].join("\n"),
                report.nodes.join("\n")
            );
            panic!("seed {seed}: {:?}", report.failure);
        }
    }
}
