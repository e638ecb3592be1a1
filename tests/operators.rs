//! The operators in virtual time, where no test sleeps: marble tables after RxPY's own tests
//! (`tests/test_observable/test_debounce.py` and `test_merge.py`), then any input against a plain
//! model of Rx's definitions.

#[allow(dead_code)]
#[path = "../main.rs"]
mod smolrx;

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Wake, Waker};
use std::time::{Duration, Instant};

use futures_lite::stream::{self, Stream, StreamExt};
use proptest::prelude::*;
use smolrx::{RxExt, Scheduler, Subject, timer};

// ---------------------------------------------------------------- virtual time

/// An instant in virtual time, in milliseconds.
type Time = u64;

/// Time stands still until the test moves it; timers wake their tasks when it does.
#[derive(Clone)]
struct VirtualTime(Rc<Shared>);

struct Shared {
    start: Instant,
    now: Cell<Time>,
    timers: RefCell<Vec<(Time, Waker)>>,
}

/// Ready from `due` on.
struct VirtualTimer {
    time: VirtualTime,
    due: Time,
}

impl VirtualTime {
    fn new() -> Self {
        VirtualTime(Rc::new(Shared { start: Instant::now(), now: Cell::new(0), timers: RefCell::default() }))
    }

    fn advance_to(&self, now: Time) {
        self.0.now.set(now);
        self.0.timers.borrow_mut().retain(|(due, task)| {
            if *due <= now {
                task.wake_by_ref();
            }
            *due > now
        });
    }

    /// When the next timer is due.
    fn next_timer(&self) -> Option<Time> {
        self.0.timers.borrow().iter().map(|(due, _)| *due).min()
    }

    fn until(&self, due: Time) -> VirtualTimer {
        VirtualTimer { time: self.clone(), due }
    }

    /// A hot source: each item at its instant, then the end at its own, or never.
    fn hot<T: Clone + 'static>(
        &self,
        items: &[(Time, T)],
        end: Option<Time>,
    ) -> impl Stream<Item = T> + use<T> {
        let steps = items.iter().cloned().map(|(at, item)| (at, Some(item)));
        let steps: Vec<_> = steps.chain(end.map(|at| (at, None))).collect();
        let time = self.clone();
        let mut steps = steps.into_iter();
        stream::unfold((), move |()| {
            let (time, step) = (time.clone(), steps.next());
            async move {
                let Some((at, item)) = step else { return std::future::pending().await };
                time.until(at).await;
                item.map(|item| (item, ()))
            }
        })
    }
}

impl Scheduler for VirtualTime {
    type Timer = VirtualTimer;

    fn now(&self) -> Instant {
        self.0.start + Duration::from_millis(self.0.now.get())
    }

    fn at(&self, due: Instant) -> VirtualTimer {
        self.until((due - self.0.start).as_millis() as Time)
    }
}

impl Future for VirtualTimer {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let shared = &self.time.0;
        if shared.now.get() >= self.due {
            return Poll::Ready(());
        }
        shared.timers.borrow_mut().push((self.due, cx.waker().clone()));
        Poll::Pending
    }
}

/// What a stream did: its items with their instants, and when it ended.
type Marbles<T> = (Vec<(Time, T)>, Option<Time>);

#[derive(Default)]
struct Flag(AtomicBool);

impl Wake for Flag {
    fn wake(self: Arc<Self>) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Observes a stream from 0 to `end`. It is polled only when it was woken, so a lost wake-up is
/// a lost item here as it would be in the program.
fn observe<S: Stream>(time: &VirtualTime, end: Time, stream: S) -> Marbles<S::Item> {
    let mut stream = std::pin::pin!(stream);
    let woken = Arc::new(Flag(AtomicBool::new(true)));
    let waker = Waker::from(woken.clone());
    let mut cx = Context::from_waker(&waker);
    let mut items = Vec::new();
    loop {
        while woken.0.swap(false, Ordering::Relaxed) {
            while let Poll::Ready(item) = stream.as_mut().poll_next(&mut cx) {
                match item {
                    Some(item) => items.push((time.0.now.get(), item)),
                    None => return (items, Some(time.0.now.get())),
                }
            }
        }
        match time.next_timer() {
            Some(next) if next <= end => time.advance_to(next),
            _ => return (items, None),
        }
    }
}

const MS: Duration = Duration::from_millis(1);

/// The debounced marbles of a hot source that has the given ones.
fn debounced(items: &[(Time, u32)], end: Option<Time>, window: u32) -> Marbles<u32> {
    debounced_with(items, end, window, None)
}

/// The same, with a longest wait.
fn debounced_with(
    items: &[(Time, u32)],
    end: Option<Time>,
    window: u32,
    max_wait: Option<u32>,
) -> Marbles<u32> {
    let time = VirtualTime::new();
    let source = time.hot(items, end);
    observe(&time, 10_000, source.debounce(time.clone(), window * MS, max_wait.map(|wait| wait * MS)))
}

// ---------------------------------------------------------------- debounce

/// RxPY's test_debounce, one table a case: what comes, the window, what goes out.
#[test]
fn debounce_does_what_rxpy_tests() {
    let each_50 = [(200, 2), (250, 3), (300, 4), (350, 5), (400, 6), (450, 7), (500, 8)];
    let bursts = [(250, 2), (350, 3), (370, 4), (421, 5), (480, 6), (490, 7), (500, 8)];

    // all pass
    let passed = [(240, 2), (290, 3), (340, 4), (390, 5), (440, 6), (490, 7), (540, 8)];
    assert_eq!(debounced(&each_50, Some(550), 40), (passed.to_vec(), Some(550)));
    // all drop, but for the last, which is pending when the source ends
    assert_eq!(debounced(&each_50, Some(550), 60), (vec![(550, 8)], Some(550)));
    // some drop
    let some = [(300, 2), (420, 4), (471, 5), (550, 8)];
    assert_eq!(debounced(&bursts, Some(600), 50), (some.to_vec(), Some(600)));
    // empty
    assert_eq!(debounced(&[], Some(200), 10), (vec![], Some(200)));
    // never
    assert_eq!(debounced(&[], None, 10), (vec![], None));
    // ends with an item pending: it comes at once, not at the end of its window
    assert_eq!(debounced(&[(400, 4)], Some(410), 60), (vec![(410, 4)], Some(410)));
    // ends with nothing pending
    assert_eq!(debounced(&[(400, 4)], Some(470), 60), (vec![(460, 4)], Some(470)));
    // the source goes on for ever: no end, and the last item still comes
    assert_eq!(debounced(&[(10, 1), (20, 2)], None, 15), (vec![(35, 2)], None));
}

/// An item that comes in the very instant in which the window ends replaces the pending one, as
/// with RxPY's schedulers, where the source's item was scheduled first.
#[test]
fn debounce_lets_the_source_go_first_at_a_tie() {
    assert_eq!(debounced(&[(100, 1), (150, 2)], Some(300), 50), (vec![(200, 2)], Some(300)));
}

/// A process that was stopped finds its timer and new items at once: the item whose silence is
/// over comes first and is not hidden by the new one.
#[test]
fn debounce_does_not_hide_an_item_behind_a_late_one() {
    let time = VirtualTime::new();
    let source = time.hot(&[(100, 1), (900, 2)], Some(2_000));
    let mut debounced = std::pin::pin!(source.debounce(time.clone(), 50 * MS, None));
    let mut cx = Context::from_waker(Waker::noop());
    time.advance_to(100);
    assert!(debounced.as_mut().poll_next(&mut cx).is_pending());
    time.advance_to(1_000); // SIGSTOP until here
    assert_eq!(debounced.as_mut().poll_next(&mut cx), Poll::Ready(Some(1)));
    assert!(debounced.as_mut().poll_next(&mut cx).is_pending());
    time.advance_to(1_050);
    assert_eq!(debounced.as_mut().poll_next(&mut cx), Poll::Ready(Some(2)));
}

/// With a longest wait a burst that never pauses gives out its latest item at least so often.
#[test]
fn debounce_gives_out_the_latest_item_after_the_longest_wait() {
    let each_50 = [(200, 2), (250, 3), (300, 4), (350, 5), (400, 6), (450, 7), (500, 8)];
    // starved without it
    assert_eq!(debounced_with(&each_50, None, 60, None).0, [(560, 8)]);
    // 120 after the first that is pending; what comes next begins a burst of its own
    assert_eq!(debounced_with(&each_50, None, 60, Some(120)).0, [(320, 4), (470, 7), (560, 8)]);
    // shorter than the window: it rules
    assert_eq!(
        debounced_with(&each_50, None, 60, Some(40)).0,
        [(240, 2), (290, 3), (340, 4), (390, 5), (440, 6), (490, 7), (540, 8)]
    );
    // an item in the very instant of the longest wait takes part, as at the end of a window
    assert_eq!(debounced_with(&each_50, None, 60, Some(100)).0, [(300, 4), (450, 7), (560, 8)]);
    // silence comes first: as without it
    assert_eq!(debounced_with(&each_50, Some(600), 40, Some(1_000)), debounced(&each_50, Some(600), 40));
    // the end comes first
    assert_eq!(debounced_with(&each_50, Some(510), 60, Some(1_000)), (vec![(510, 8)], Some(510)));
}

/// A flood sets one timer a window, not one an item.
#[test]
fn debounce_does_not_set_a_timer_for_each_item() {
    let time = VirtualTime::new();
    let flood: Vec<_> = (0..1_000).map(|at| (at, at)).collect();
    let timers = Rc::new(Cell::new(0));
    let counted = Counting(time.clone(), timers.clone());
    let (items, _) = observe(&time, 10_000, time.hot(&flood, None).debounce(counted, 100 * MS, None));
    assert_eq!(items, [(1_099, 999)]);
    assert!(timers.get() <= 12, "{} timers", timers.get());
}

/// Virtual time that counts the timers set.
#[derive(Clone)]
struct Counting(VirtualTime, Rc<Cell<u32>>);

impl Scheduler for Counting {
    type Timer = VirtualTimer;

    fn now(&self) -> Instant {
        self.0.now()
    }

    fn at(&self, due: Instant) -> VirtualTimer {
        self.1.set(self.1.get() + 1);
        self.0.at(due)
    }
}

// ---------------------------------------------------------------- merge

/// The merged marbles of two hot sources.
fn merged(a: &[(Time, char)], a_end: Option<Time>, b: &[(Time, char)], b_end: Option<Time>) -> Marbles<char> {
    let time = VirtualTime::new();
    let both = time.hot(a, a_end).merge(time.hot(b, b_end));
    observe(&time, 10_000, both)
}

/// RxPY's test_merge: never, empty and return in all pairs, then two that overlap.
#[test]
fn merge_does_what_rxpy_tests() {
    let some = [(210, 'x')];
    assert_eq!(merged(&[], None, &[], None), (vec![], None)); // never, never
    assert_eq!(merged(&[], None, &[], Some(245)), (vec![], None)); // never, empty
    assert_eq!(merged(&[], Some(245), &[], None), (vec![], None)); // empty, never
    assert_eq!(merged(&some, Some(245), &[], None), (some.to_vec(), None)); // return, never
    assert_eq!(merged(&[], None, &some, Some(245)), (some.to_vec(), None)); // never, return
    assert_eq!(merged(&[], Some(245), &[], Some(230)), (vec![], Some(245))); // empty, empty
    assert_eq!(merged(&some, Some(245), &[], Some(220)), (some.to_vec(), Some(245))); // return, empty
    assert_eq!(merged(&[], Some(245), &some, Some(220)), (some.to_vec(), Some(245))); // empty, return

    let a = [(210, 'a'), (230, 'b'), (235, 'c')];
    let b = [(215, 'v'), (225, 'w'), (240, 'x')];
    let both = [(210, 'a'), (215, 'v'), (225, 'w'), (230, 'b'), (235, 'c'), (240, 'x')];
    assert_eq!(merged(&a, Some(245), &b, Some(250)), (both.to_vec(), Some(250)));
    assert_eq!(merged(&a, Some(250), &b, Some(245)), (both.to_vec(), Some(250)));
}

/// Two sources that always have an item take turns: neither starves.
#[test]
fn merge_takes_turns() {
    let both = stream::repeat('a').merge(stream::repeat('b'));
    let taken: String = stream::block_on(both.take(10)).collect();
    assert_eq!(taken, "ababababab");
}

// ---------------------------------------------------------------- timer

/// `timer(0, interval)`: 0 at once, then one more each interval.
#[test]
fn timer_ticks_at_once_and_then_each_period() {
    let time = VirtualTime::new();
    let ticks = observe(&time, 350, timer(time.clone(), Duration::ZERO, 100 * MS));
    assert_eq!(ticks, (vec![(0, 0), (100, 1), (200, 2), (300, 3)], None));
}

/// RxPY's rule for a timer that is late: the count goes on one by one, the period starts anew.
#[test]
fn timer_does_not_make_up_for_missed_ticks() {
    let time = VirtualTime::new();
    let mut ticks = std::pin::pin!(timer(time.clone(), Duration::ZERO, 100 * MS));
    let mut cx = Context::from_waker(Waker::noop());
    assert_eq!(ticks.as_mut().poll_next(&mut cx), Poll::Ready(Some(0)));
    time.advance_to(1_030); // ten ticks are missed
    assert_eq!(ticks.as_mut().poll_next(&mut cx), Poll::Ready(Some(1)));
    assert!(ticks.as_mut().poll_next(&mut cx).is_pending());
    time.advance_to(1_130);
    assert_eq!(ticks.as_mut().poll_next(&mut cx), Poll::Ready(Some(2)));
    assert!(ticks.as_mut().poll_next(&mut cx).is_pending());
}

// ---------------------------------------------------------------- subject

/// The subject hands items on in order, ends when complete, and its callers wait while it holds 64 KiB.
#[test]
fn subject_is_bounded_and_ends() {
    let subject = Subject::default();
    let mut cx = Context::from_waker(Waker::noop());
    let item = |number: usize| vec![b'x'; 1000 + number % 2];
    let mut bytes = 0;
    let mut room = 0;
    while subject.poll_ready(&mut cx).is_ready() {
        assert!(bytes < 64 * 1024, "room for an item beyond {bytes} bytes");
        subject.on_next(item(room));
        bytes += item(room).len() + size_of::<Vec<u8>>();
        room += 1;
    }
    assert!(bytes >= 64 * 1024, "no room at {bytes} bytes");
    subject.on_completed();
    let items: Vec<_> = stream::block_on(Box::pin(subject.observe())).collect();
    assert_eq!(items, Vec::from_iter((0..room).map(item)));
    assert!(subject.poll_ready(&mut cx).is_ready());
}

/// An item of any size finds room in an empty subject.
#[test]
fn subject_takes_one_large_item() {
    let subject = Subject::default();
    let mut cx = Context::from_waker(Waker::noop());
    assert!(subject.poll_ready(&mut cx).is_ready());
    subject.on_next(vec![0; 1 << 20]);
    assert!(subject.poll_ready(&mut cx).is_pending());
    subject.on_completed();
    assert_eq!(stream::block_on(Box::pin(subject.observe())).count(), 1);
}

/// The pipeline as it is in the program: both sources end, the pending item comes, then the end.
#[test]
fn the_pipeline_ends_when_subject_and_clock_have() {
    let time = VirtualTime::new();
    let lines = time.hot(&[(20, "foo".to_string()), (205, "bar".to_string())], Some(210));
    let clock = timer(time.clone(), Duration::ZERO, 100 * MS).map(|tick| tick.to_string());
    let clock = stream::stop_after_future(clock, time.until(210));
    let events = lines.merge(clock).debounce(time.clone(), 10 * MS, None);
    let expected = [(10, "0"), (30, "foo"), (110, "1"), (210, "bar")];
    let expected: Vec<_> = expected.map(|(at, event)| (at, event.to_string())).to_vec();
    assert_eq!(observe(&time, 1_000, events), (expected, Some(210)));
}

// ---------------------------------------------------------------- properties

/// Items with rising instants, and an end after them or none.
fn marbles() -> impl Strategy<Value = (Vec<(Time, u32)>, Option<Time>)> {
    let gaps = prop::collection::vec((0..40u64, any::<u32>()), 0..40);
    (gaps, prop::option::of(0..100u64)).prop_map(|(gaps, after)| {
        let mut at = 0;
        let items: Vec<_> = gaps.into_iter().map(|(gap, item)| (at += gap, (at, item)).1).collect();
        (items, after.map(|after| at + after))
    })
}

proptest! {
    /// ReactiveX: debounce "only emits an item if a particular timespan has passed without it
    /// emitting another item"; the end lets the pending item out.
    #[test]
    fn debounce_equals_its_definition((items, end) in marbles(), window in 1..60u32) {
        let mut expected = Vec::new();
        for (index, &(at, item)) in items.iter().enumerate() {
            let next = items.get(index + 1).map(|&(at, _)| at);
            let due = at + Time::from(window);
            if next.is_none_or(|next| next > due) {
                let out = if next.is_none() { end.map_or(due, |end| end.min(due)) } else { due };
                expected.push((out, item));
            }
        }
        prop_assert_eq!(debounced(&items, end, window), (expected, end));
    }

    /// The reference model of `max_wait`: millisecond by millisecond, what comes replaces what is
    /// pending; it goes out when `window` has passed since it came, or `max_wait` since the first
    /// that was pending after the last one that went out.
    #[test]
    fn debounce_with_a_longest_wait_equals_its_model(
        (items, end) in marbles(), window in 1..60u32, max_wait in prop::option::of(1..120u32)
    ) {
        let (window_ms, wait_ms) = (Time::from(window), max_wait.map(Time::from));
        let last = items.last().map_or(0, |&(at, _)| at) + 200;
        let mut expected = Vec::new();
        let (mut pending, mut first, mut latest) = (None, 0, 0);
        for now in 0..=end.unwrap_or(last) {
            for &(_, item) in items.iter().filter(|&&(at, _)| at == now) {
                first = if pending.is_none() { now } else { first };
                (pending, latest) = (Some(item), now);
            }
            let is_due = now >= latest + window_ms || wait_ms.is_some_and(|wait| now >= first + wait);
            if pending.is_some() && (is_due || end == Some(now)) {
                expected.extend(pending.take().map(|item| (now, item)));
            }
        }
        prop_assert_eq!(debounced_with(&items, end, window, max_wait), (expected, end));
    }

    /// ReactiveX: merge passes on every item of each source when it comes, each source's in its
    /// order, and ends when all sources have.
    #[test]
    fn merge_equals_its_definition((a, a_end) in marbles(), (b, b_end) in marbles()) {
        let time = VirtualTime::new();
        let tag = |source: &[(Time, u32)], tag: char| -> Vec<_> {
            source.iter().map(|&(at, item)| (at, (tag, item))).collect()
        };
        let (a, b) = (tag(&a, 'a'), tag(&b, 'b'));
        let (out, end) = observe(&time, 100_000, time.hot(&a, a_end).merge(time.hot(&b, b_end)));
        let only = |tag: char| -> Vec<_> {
            out.iter().copied().filter(|(_, (from, _))| *from == tag).collect()
        };
        prop_assert_eq!(only('a'), a);
        prop_assert_eq!(only('b'), b);
        prop_assert!(out.is_sorted_by_key(|(at, _)| *at));
        prop_assert_eq!(end, a_end.zip(b_end).map(|(a, b)| a.max(b)));
    }
}
