//! Numbers that peers use for things of ours, and that nobody can guess.
//!
//! Owns: the randomness of a device's queue pair numbers and memory keys, and the way from such a
//! number to a place in a table.
//!
//! RoCE has no authentication: who knows a number can use it from an address that may. So numbers are
//! drawn, not counted. The source is SipHash under a key that the operating system gave (`getrandom`):
//! who has seen some of its numbers knows nothing of the others.

use std::hash::{BuildHasher, RandomState};
#[cfg(any(test, fuzzing))]
use std::hash::{BuildHasherDefault, DefaultHasher};

/// Numbers that nobody can guess.
#[derive(Debug, Default)]
pub(crate) struct Random {
    source: Source,
    drawn: u64,
}

#[derive(Debug)]
enum Source {
    Secret(RandomState),
    /// The same numbers in every run.
    #[cfg(any(test, fuzzing))]
    Known(BuildHasherDefault<DefaultHasher>),
}

impl Default for Source {
    fn default() -> Source {
        Source::Secret(RandomState::new())
    }
}

impl Random {
    /// The same numbers in every run.
    #[cfg(any(test, fuzzing))]
    pub(crate) fn known() -> Random {
        Random {
            source: Source::Known(BuildHasherDefault::default()),
            drawn: 0,
        }
    }

    pub(crate) fn draw(&mut self) -> u64 {
        self.drawn += 1;
        match &self.source {
            Source::Secret(keyed) => keyed.hash_one(self.drawn),
            #[cfg(any(test, fuzzing))]
            Source::Known(keyed) => keyed.hash_one(self.drawn),
        }
    }
}

/// No such place.
const NONE: u32 = u32::MAX;
const SLOTS_MIN: usize = 64;

/// From names of 24 bits to places in a table. Each name has a slot to itself, by its low bits, so
/// that finding one is a look at one slot: names are drawn until they do.
#[derive(Debug, Default)]
pub(crate) struct Names {
    /// Name and place; a power of two, at least twice the names. A free one has place [`NONE`].
    slots: Vec<(u32, u32)>,
    count: usize,
}

impl Names {
    /// Draws a name that `admits` for a place in the table.
    pub(crate) fn insert(
        &mut self,
        place: u32,
        random: &mut Random,
        admits: impl Fn(u32) -> bool,
    ) -> u32 {
        if 2 * (self.count + 1) > self.slots.len() {
            self.grow();
        }
        loop {
            let name = random.draw() as u32 >> 8;
            let mask = self.slots.len() - 1;
            let slot = &mut self.slots[name as usize & mask];
            if slot.1 == NONE && admits(name) {
                *slot = (name, place);
                self.count += 1;
                return name;
            }
        }
    }

    fn grow(&mut self) {
        let len = (2 * self.slots.len()).max(SLOTS_MIN);
        let old = std::mem::replace(&mut self.slots, vec![(0, NONE); len]);
        // Names that differ in few low bits differ in more of them.
        for (name, place) in old.into_iter().filter(|(_, place)| *place != NONE) {
            self.slots[name as usize & (len - 1)] = (name, place);
        }
    }

    /// The place of a name.
    pub(crate) fn find(&self, name: u32) -> Option<u32> {
        let mask = self.slots.len().wrapping_sub(1);
        let (known, place) = *self.slots.get(name as usize & mask)?;
        (known == name && place != NONE).then_some(place)
    }

    pub(crate) fn remove(&mut self, name: u32) {
        if self.find(name).is_some() {
            let mask = self.slots.len() - 1;
            self.slots[name as usize & mask].1 = NONE;
            self.count -= 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    #[test]
    fn names_lead_to_their_places_and_nothing_else_does() {
        let (mut names, mut random) = (Names::default(), Random::known());
        assert_eq!(names.find(0), None);
        let mut model = HashMap::new();
        for place in 0..20_000 {
            let name = names.insert(place, &mut random, |name| name >= 16);
            assert!((16..1 << 24).contains(&name));
            assert_eq!(model.insert(name, place), None);
            if place % 3 == 0 {
                let gone = *model.keys().next().unwrap();
                model.remove(&gone);
                names.remove(gone);
                names.remove(gone);
            }
        }
        assert_eq!(names.count, model.len());
        for name in 0..1 << 24 {
            assert_eq!(names.find(name), model.get(&name).copied());
        }
    }

    #[test]
    fn every_bit_is_random_and_every_source_is_another() {
        let (mut one, mut other) = (Random::default(), Random::default());
        let mut ones = [0u32; 64];
        for _ in 0..4096 {
            let (a, b) = (one.draw(), other.draw());
            assert_ne!(a, b);
            for (bit, count) in ones.iter_mut().enumerate() {
                *count += (a >> bit) as u32 & 1;
            }
        }
        // Ten standard deviations.
        for (bit, count) in ones.iter().enumerate() {
            assert!((1728..=2368).contains(count), "bit {bit}: {count} of 4096");
        }
    }
}
