//! A bounded lock-free queue from one thread to another.
//!
//! Owns: the ring, and the sleep of its receiver. One thread sends, one receives; the types are not
//! `Clone`, so the compiler keeps it that way. Nothing is lost, nothing arrives twice, the order is
//! the sender's (Q1).
//!
//! Sleep: the receiver says that it is going to sleep, looks once more, and parks; the sender looks
//! for that word after every send. The two fences order each side's write before its look at the
//! other's, so that not both miss (the pattern of Dekker's algorithm).
//!
//! Deliberately absent: many senders or receivers, growth, waiting for room (whoever finds the ring
//! full keeps what it has and comes again).

#[cfg(loom)]
use loom::{
    cell::UnsafeCell,
    sync::Arc,
    sync::atomic::{AtomicBool, AtomicUsize, Ordering, fence},
    thread::{self, Thread},
};
#[cfg(not(loom))]
use std::{
    sync::Arc,
    sync::atomic::{AtomicBool, AtomicUsize, Ordering, fence},
    thread::{self, Thread},
};

use std::mem::MaybeUninit;
use std::sync::{Mutex, PoisonError};

/// As loom's cell, so that the code below is one for both.
#[cfg(not(loom))]
#[derive(Debug)]
struct UnsafeCell<T>(std::cell::UnsafeCell<T>);

#[cfg(not(loom))]
impl<T> UnsafeCell<T> {
    fn new(value: T) -> UnsafeCell<T> {
        UnsafeCell(std::cell::UnsafeCell::new(value))
    }

    fn with_mut<R>(&self, act: impl FnOnce(*mut T) -> R) -> R {
        act(self.0.get())
    }
}

/// Each index on a cache line of its own: the two threads write one each.
#[repr(align(64))]
#[derive(Debug)]
struct Line<T>(T);

#[derive(Debug)]
struct Shared<T> {
    slots: Box<[UnsafeCell<MaybeUninit<T>>]>,
    /// Values received so far; slot `head % length` is the next to be read.
    head: Line<AtomicUsize>,
    /// Values sent so far; slot `tail % length` is the next to be written.
    tail: Line<AtomicUsize>,
    /// The receiver sleeps or is about to.
    asleep: Line<AtomicBool>,
    /// The sender is gone.
    closed: AtomicBool,
    receiver: Mutex<Option<Thread>>,
}

// SAFETY: a slot is accessed by one side at a time: by the sender while it lies from `tail` to
// `head + length`, by the receiver while it lies from `head` to `tail`; the Release stores of the
// indices hand it over. So sharing needs only that values may move between threads.
unsafe impl<T: Send> Sync for Shared<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Send for Shared<T> {}

/// The sending end.
#[derive(Debug)]
pub struct Sender<T> {
    shared: Arc<Shared<T>>,
    /// `tail`, which only this end changes.
    tail: usize,
    /// What this end knows of `head`: at most the real one.
    head: usize,
}

/// The receiving end.
#[derive(Debug)]
pub struct Receiver<T> {
    shared: Arc<Shared<T>>,
    /// `head`, which only this end changes.
    head: usize,
    /// What this end knows of `tail`: at most the real one.
    tail: usize,
}

/// A ring that holds up to `capacity` values, at least 1.
#[must_use]
pub fn ring<T>(capacity: usize) -> (Sender<T>, Receiver<T>) {
    let slots = (0..capacity.max(1)).map(|_| UnsafeCell::new(MaybeUninit::uninit()));
    let shared = Arc::new(Shared {
        slots: slots.collect(),
        head: Line(AtomicUsize::new(0)),
        tail: Line(AtomicUsize::new(0)),
        asleep: Line(AtomicBool::new(false)),
        closed: AtomicBool::new(false),
        receiver: Mutex::new(None),
    });
    let sender = Sender {
        shared: shared.clone(),
        tail: 0,
        head: 0,
    };
    let receiver = Receiver {
        shared,
        head: 0,
        tail: 0,
    };
    (sender, receiver)
}

impl<T> Sender<T> {
    /// Sends a value, and wakes the receiver if it sleeps.
    ///
    /// # Errors
    /// The value, if the ring is full.
    pub fn send(&mut self, value: T) -> Result<(), T> {
        let shared = &*self.shared;
        let length = shared.slots.len();
        if self.tail.wrapping_sub(self.head) == length {
            // Acquire pairs with the Release in `receive`: what is received has left its slot.
            self.head = shared.head.0.load(Ordering::Acquire);
            if self.tail.wrapping_sub(self.head) == length {
                return Err(value);
            }
        }
        shared.slots[self.tail % length].with_mut(|slot| {
            // SAFETY: the slot lies from `tail` to `head + length`, so it is this end's alone and
            // holds no value.
            unsafe { (*slot).write(value) };
        });
        self.tail = self.tail.wrapping_add(1);
        // Release pairs with the Acquire in `receive`: the value is in its slot.
        shared.tail.0.store(self.tail, Ordering::Release);
        shared.wake();
        Ok(())
    }
}

impl<T> Shared<T> {
    fn wake(&self) {
        // Pairs with the fence in `wait`: either this thread sees that the receiver is about to
        // sleep, or the receiver sees what was written before.
        fence(Ordering::SeqCst);
        if self.asleep.0.load(Ordering::Relaxed) {
            let receiver = self.receiver.lock();
            if let Some(thread) = &*receiver.unwrap_or_else(PoisonError::into_inner) {
                thread.unpark();
            }
        }
    }
}

impl<T> Receiver<T> {
    /// The next value, if there is one.
    pub fn receive(&mut self) -> Option<T> {
        let shared = &*self.shared;
        if self.head == self.tail {
            // Acquire pairs with the Release in `send`.
            self.tail = shared.tail.0.load(Ordering::Acquire);
            if self.head == self.tail {
                return None;
            }
        }
        let length = shared.slots.len();
        let value = shared.slots[self.head % length].with_mut(|slot| {
            // SAFETY: the slot lies from `head` to `tail`, so it is this end's alone and holds a
            // value, which moves out here: `head` goes past it.
            unsafe { (*slot).assume_init_read() }
        });
        self.head = self.head.wrapping_add(1);
        // Release pairs with the Acquire in `send`: the value has left its slot.
        shared.head.0.store(self.head, Ordering::Release);
        Some(value)
    }

    /// Sleeps until there may be a value or the sender is gone; `false` when it is gone and
    /// everything was received. May return early.
    pub fn wait(&mut self) -> bool {
        let shared = &*self.shared;
        *shared
            .receiver
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = Some(thread::current());
        // Relaxed: the fences order it, here and in `wake`.
        shared.asleep.0.store(true, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        // Acquire pairs with the Release in `drop`: what was sent before is seen below.
        let closed = shared.closed.load(Ordering::Acquire);
        let empty = shared.tail.0.load(Ordering::Acquire) == self.head;
        if empty && !closed {
            thread::park();
        }
        shared.asleep.0.store(false, Ordering::Relaxed);
        !(closed && empty)
    }
}

impl<T> Drop for Sender<T> {
    fn drop(&mut self) {
        // Release pairs with the Acquire in `wait`.
        self.shared.closed.store(true, Ordering::Release);
        self.shared.wake();
    }
}

impl<T> Drop for Shared<T> {
    fn drop(&mut self) {
        // Both ends are gone; Arc has ordered what they did before this.
        let tail = self.tail.0.load(Ordering::Relaxed);
        let mut head = self.head.0.load(Ordering::Relaxed);
        while head != tail {
            self.slots[head % self.slots.len()].with_mut(|slot| {
                // SAFETY: the slot lies from `head` to `tail`, so it holds a value.
                unsafe { (*slot).assume_init_drop() };
            });
            head = head.wrapping_add(1);
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn what_is_sent_arrives_once_and_in_order() {
        let (mut sender, mut receiver) = ring(4);
        let thread = std::thread::spawn(move || {
            let mut expected = 0u64;
            loop {
                while let Some(found) = receiver.receive() {
                    assert_eq!(found, Box::new(expected));
                    expected += 1;
                }
                if !receiver.wait() {
                    return expected;
                }
            }
        });
        for number in 0..100_000u64 {
            let mut value = Box::new(number);
            while let Err(back) = sender.send(value) {
                value = back;
                std::thread::yield_now();
            }
        }
        drop(sender);
        assert_eq!(thread.join().unwrap(), 100_000);
    }

    #[test]
    fn a_full_ring_gives_the_value_back_and_drops_what_it_holds() {
        let (mut sender, mut receiver) = ring(2);
        let value = std::sync::Arc::new(());
        assert!(sender.send(value.clone()).is_ok() && sender.send(value.clone()).is_ok());
        assert!(sender.send(value.clone()).is_err());
        assert!(receiver.receive().is_some());
        assert!(sender.send(value.clone()).is_ok());
        drop(receiver);
        drop(sender);
        assert_eq!(std::sync::Arc::strong_count(&value), 1);
    }
}

#[cfg(all(test, loom))]
mod loom_tests {
    use super::*;

    /// A sender of `values`, with retries, and a receiver that sleeps: all arrive, in order, and the
    /// receiver learns of the end (no lost wake-up). In every interleaving in which threads are
    /// interrupted at most `preemptions` times; all there are would take hours.
    fn nothing_is_lost(capacity: usize, values: u32, preemptions: usize) {
        let mut model = loom::model::Builder::new();
        model.preemption_bound = Some(preemptions);
        model.check(move || {
            let (mut sender, mut receiver) = ring::<Box<u32>>(capacity);
            // The receiver is the thread that is joined: loom takes an unpark that comes late for
            // the end of a join.
            let thread = thread::spawn(move || {
                let mut expected = 0;
                loop {
                    while let Some(found) = receiver.receive() {
                        assert_eq!(*found, expected);
                        expected += 1;
                    }
                    if !receiver.wait() {
                        return expected;
                    }
                }
            });
            for number in 0..values {
                let mut value = Box::new(number);
                while let Err(back) = sender.send(value) {
                    value = back;
                    thread::yield_now();
                }
            }
            drop(sender);
            assert_eq!(thread.join().unwrap(), values);
        });
    }

    #[test]
    fn two_values_through_one_slot() {
        nothing_is_lost(1, 2, 5);
    }

    #[test]
    fn three_values_through_two_slots() {
        nothing_is_lost(2, 3, 4);
    }

    /// A receiver that goes away leaves nothing behind, and a sender does not care.
    #[test]
    fn a_receiver_may_leave() {
        loom::model(|| {
            let (mut sender, receiver) = ring::<Box<u32>>(2);
            let thread = thread::spawn(move || drop(receiver));
            thread.join().unwrap();
            drop(sender.send(Box::new(1)));
        });
    }
}
