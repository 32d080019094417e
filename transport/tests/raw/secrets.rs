//! What a stranger would have to guess.

use super::*;

/// All numbers that a device gives out for so many objects: queue pairs, first PSNs, keys.
fn numbers(objects: usize) -> [Vec<u32>; 3] {
    let context = Context::open(common::address(), &options()).unwrap();
    let pd = context.protection_domain();
    let cq = context.completion_queue(1, None).unwrap();
    let queues = Queues {
        send: &cq,
        recv: &cq,
        shared: None,
    };
    let qps: Vec<_> = (0..objects)
        .map(|_| pd.queue_pair(queues, &init_attr(QpType::Rc)).unwrap())
        .collect();
    let pages = Pages::new(4096);
    let regions: Vec<_> = (0..objects).map(|_| pages.register(&pd, ALL)).collect();
    [
        qps.iter().map(|qp| qp.qpn().value()).collect(),
        qps.iter().map(|qp| qp.random_psn().value()).collect(),
        regions.iter().map(|region| region.rkey().0).collect(),
    ]
}

#[test]
fn queue_pairs_psns_and_whole_keys_are_random_and_of_one_device_alone() {
    const OBJECTS: usize = 1024;
    let [one, other] = [numbers(OBJECTS), numbers(OBJECTS)];
    for (what, bits, (ours, theirs)) in [
        ("queue pair number", 24, (&one[0], &other[0])),
        ("first PSN", 24, (&one[1], &other[1])),
        ("key", 32, (&one[2], &other[2])),
    ] {
        for bit in 0..bits {
            let ones = ours.iter().filter(|number| *number >> bit & 1 == 1).count();
            // Ten standard deviations.
            assert!(
                (352..=672).contains(&ones),
                "{what}, bit {bit}: {ones} of {OBJECTS}"
            );
        }
        // Neighbours say nothing of each other: steps that repeat would be a counter.
        let mut steps: Vec<u32> = ours.windows(2).map(|w| w[1].wrapping_sub(w[0])).collect();
        steps.sort_unstable();
        steps.dedup();
        assert!(steps.len() > OBJECTS - 8, "{what}: {} steps", steps.len());
        let common = ours.iter().filter(|number| theirs.contains(number)).count();
        assert!(common < 8, "{what}: {common} in common");
    }
}
