//! The operators in virtual time, where no test sleeps: marble tables, those of `debounce` after RxPY's own
//! (`tests/test_observable/test_debounce.py`), then any input against plain models.

#[allow(dead_code)]
#[path = "../main.rs"]
mod smolrx;

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::mem;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Wake, Waker};
use std::time::{Duration, Instant};

use futures_lite::stream::{self, Stream, StreamExt};
use proptest::prelude::*;
use smolrx::Event::{self, Tick};
use smolrx::rx::{RxExt, Scheduler, Subject, timer};

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

/// The debounced marbles of a hot source that has the given ones, reduced as Rx does.
fn debounced(items: &[(Time, u32)], end: Option<Time>, window: u32) -> Marbles<u32> {
    debounced_with(items, end, window, None, |_, later| later)
}

/// The same, with a longest wait and another way to reduce a burst.
fn debounced_with<T: Clone + 'static>(
    items: &[(Time, T)],
    end: Option<Time>,
    window: u32,
    max_wait: Option<u32>,
    reduce: fn(T, T) -> T,
) -> Marbles<T> {
    let time = VirtualTime::new();
    let max_wait = max_wait.map(|wait| wait * MS);
    observe(&time, 10_000, time.hot(items, end).debounce(time.clone(), window * MS, max_wait, reduce))
}

/// Events whose marbles are short to write.
fn line(text: &str) -> Event {
    Event::Line(text.into())
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
    let mut debounced = std::pin::pin!(source.debounce(time.clone(), 50 * MS, None, |_, later| later));
    let mut cx = Context::from_waker(Waker::noop());
    time.advance_to(100);
    assert!(debounced.as_mut().poll_next(&mut cx).is_pending());
    time.advance_to(1_000); // SIGSTOP until here
    assert_eq!(debounced.as_mut().poll_next(&mut cx), Poll::Ready(Some(1)));
    assert!(debounced.as_mut().poll_next(&mut cx).is_pending());
    time.advance_to(1_050);
    assert_eq!(debounced.as_mut().poll_next(&mut cx), Poll::Ready(Some(2)));
}

/// With a longest wait, a burst that never pauses gives out its latest item at least so often.
#[test]
fn debounce_gives_out_the_latest_item_after_the_longest_wait() {
    let each_50 = [(200, 2), (250, 3), (300, 4), (350, 5), (400, 6), (450, 7), (500, 8)];
    let waited = |window, max_wait| debounced_with(&each_50, None, window, max_wait, |_, later| later).0;
    // starved without it
    assert_eq!(waited(60, None), [(560, 8)]);
    // 120 after the first that is pending; what comes next begins a burst of its own
    assert_eq!(waited(60, Some(120)), [(320, 4), (470, 7), (560, 8)]);
    // shorter than the window: it rules
    let each = [(240, 2), (290, 3), (340, 4), (390, 5), (440, 6), (490, 7), (540, 8)];
    assert_eq!(waited(60, Some(40)), each);
    // an item in the very instant of the longest wait takes part, as at the end of a window
    assert_eq!(waited(60, Some(100)), [(300, 4), (450, 7), (560, 8)]);
    // silence comes first: as without it
    assert_eq!(waited(40, Some(1_000)), each);
    // the end comes first
    let ended = debounced_with(&each_50, Some(510), 60, Some(1_000), |_, later| later);
    assert_eq!(ended, (vec![(510, 8)], Some(510)));
}

/// With a longest wait, even a source that always has an item lets a burst out.
#[test]
fn debounce_with_a_longest_wait_outlasts_a_source_that_is_always_ready() {
    let time = VirtualTime::new();
    let clock = time.clone();
    let source = stream::repeat_with(move || {
        let now = clock.0.now.get() + 1;
        assert!(now < 1_000, "the source was asked for item {now}, and no burst came out");
        clock.advance_to(now);
        now
    });
    let mut debounced = std::pin::pin!(source.debounce(time, 10 * MS, Some(50 * MS), |_, later| later));
    let mut cx = Context::from_waker(Waker::noop());
    for latest in [51, 102] {
        assert_eq!(debounced.as_mut().poll_next(&mut cx), Poll::Ready(Some(latest)));
    }
}

/// A burst is what `reduce` makes of it, from the earliest item to the latest, and of one burst only.
#[test]
fn debounce_reduces_each_burst_by_itself() {
    let items = [(100, 1), (110, 2), (115, 3), (200, 4), (205, 5), (300, 6)];
    let digits = |earlier, later| 10 * earlier + later;
    let bursts = vec![(135, 123), (225, 45), (310, 6)];
    assert_eq!(debounced_with(&items, Some(310), 20, None, digits), (bursts, Some(310)));
    // a longest wait cuts it, and the rest is a burst of its own
    let cut = vec![(110, 12), (125, 3), (210, 45), (310, 6)];
    assert_eq!(debounced_with(&items, Some(400), 20, Some(10), digits).0, cut);
}

/// Of a burst of lines and ticks the last line is the event, and a tick only if there is no line; but a tick
/// prolongs the burst as a line does.
#[test]
fn a_tick_never_replaces_a_line() {
    let events = |items: &[(Time, Event)]| debounced_with(items, None, 20, None, Event::reduce).0;
    assert_eq!(events(&[(100, line("poke")), (110, Tick(1))]), [(130, line("poke"))]);
    assert_eq!(events(&[(100, Tick(1)), (110, line("poke"))]), [(130, line("poke"))]);
    assert_eq!(events(&[(100, line("a")), (110, line("b")), (115, Tick(1))]), [(135, line("b"))]);
    assert_eq!(events(&[(100, line("a")), (110, Tick(1)), (115, line("b"))]), [(135, line("b"))]);
    assert_eq!(events(&[(100, Tick(1)), (110, Tick(2))]), [(130, Tick(2))]);
    // an empty line is a line
    assert_eq!(events(&[(100, line("")), (110, Tick(1))]), [(130, line(""))]);
    // the next burst knows nothing of it
    let apart = [(100, line("poke")), (130, Tick(1))];
    assert_eq!(events(&apart), [(120, line("poke")), (150, Tick(1))]);
    assert_eq!([line("poke"), Tick(1)].map(Event::text), ["poke", "1"]);
}

/// A flood sets one timer a window, not one an item.
#[test]
fn debounce_does_not_set_a_timer_for_each_item() {
    let time = VirtualTime::new();
    let flood: Vec<_> = (0..1_000).map(|at| (at, at)).collect();
    let timers = Rc::new(Cell::new(0));
    let counted = Counting(time.clone(), timers.clone());
    let (items, _) =
        observe(&time, 10_000, time.hot(&flood, None).debounce(counted, 100 * MS, None, |_, later| later));
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

// ---------------------------------------------------------------- then_latest

/// The marbles of `then_latest`, whose futures take as long as `run` says: an item comes out when its run has
/// ended, with the instant in which that began.
fn runs<T: Clone + 'static>(
    items: &[(Time, T)],
    end: Option<Time>,
    reduce: fn(T, T) -> T,
    run: fn(&T) -> Time,
) -> Marbles<(Time, T)> {
    let time = VirtualTime::new();
    let runs = time.hot(items, end).then_latest(reduce, |item| {
        let (start, due) = (time.0.now.get(), time.until(time.0.now.get() + run(&item)));
        async move {
            due.await;
            (start, item)
        }
    });
    observe(&time, 10_000, runs)
}

/// One future runs at a time; what comes meanwhile is reduced to one item, whose turn is next.
#[test]
fn then_latest_runs_one_at_a_time_and_then_the_latest() {
    let items = [(100, 'a'), (110, 'b'), (120, 'c'), (300, 'd')];
    let each_50 = |end| runs(&items, end, |_, later| later, |_| 50);
    let ran = vec![(150, (100, 'a')), (200, (150, 'c')), (350, (300, 'd'))];
    assert_eq!(each_50(None), (ran.clone(), None));
    assert_eq!(each_50(Some(400)), (ran.clone(), Some(400)));
    // the end of the source waits for the run
    assert_eq!(each_50(Some(310)), (ran, Some(350)));
    // and for the run of what is pending
    let pending = runs(&items[..3], Some(125), |_, later| later, |_| 50);
    assert_eq!(pending, (vec![(150, (100, 'a')), (200, (150, 'c'))], Some(200)));
    // what comes is reduced, not just replaced
    let items = [(100, 1), (110, 2), (120, 3), (130, 4)];
    let reduced = runs(&items, Some(130), |earlier, later| 10 * earlier + later, |_| 50);
    assert_eq!(reduced, (vec![(150, (100, 1)), (200, (150, 234))], Some(200)));
    // in the very instant in which a run ends, the source goes first
    let tie = runs(&[(100, 'a'), (110, 'b'), (150, 'c')], Some(160), |_, later| later, |_| 50);
    assert_eq!(tie, (vec![(150, (100, 'a')), (200, (150, 'c'))], Some(200)));
    // futures that are ready at once: futures-lite's `then`
    let at_once = runs(&[(100, 'a'), (110, 'b')], Some(120), |_, later| later, |_| 0);
    assert_eq!(at_once, (vec![(100, (100, 'a')), (110, (110, 'b'))], Some(120)));
    // empty, never
    assert_eq!(runs::<char>(&[], Some(200), |_, later| later, |_| 50), (vec![], Some(200)));
    assert_eq!(runs::<char>(&[], None, |_, later| later, |_| 50), (vec![], None));
}

/// While a future runs, the source is not held up: its items are taken when they come.
#[test]
fn then_latest_takes_items_while_a_future_runs() {
    let time = VirtualTime::new();
    let taken = RefCell::new(Vec::new());
    let source = time.hot(&[(100, 'a'), (110, 'b'), (120, 'c')], None);
    let source = source.inspect(|&item| taken.borrow_mut().push((time.0.now.get(), item)));
    let runs = source.then_latest(|_, later| later, |_| time.until(1_000));
    observe(&time, 500, runs);
    assert_eq!(*taken.borrow(), [(100, 'a'), (110, 'b'), (120, 'c')]);
}

/// While a command runs, ticks replace no line that waits.
#[test]
fn a_tick_replaces_no_line_that_waits_for_a_run() {
    let items = [(100, Tick(0)), (110, line("a")), (120, line("b")), (200, Tick(1))];
    let ran = runs(&items, Some(210), Event::reduce, |_| 150);
    assert_eq!(ran, (vec![(250, (100, Tick(0))), (400, (250, line("b")))], Some(400)));
}

// ---------------------------------------------------------------- timer

/// `timer(delay, period)` counts from 0: first after the delay, which may be none, and then each period.
#[test]
fn timer_ticks_after_the_delay_and_then_each_period() {
    let time = VirtualTime::new();
    let ticks = observe(&time, 350, timer(time.clone(), Duration::ZERO, 100 * MS));
    assert_eq!(ticks, (vec![(0, 0), (100, 1), (200, 2), (300, 3)], None));
    let late = observe(&time, 600, timer(time.clone(), 50 * MS, 100 * MS));
    assert_eq!(late, (vec![(350, 0), (450, 1), (550, 2)], None));
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

/// The subject holds the latest item alone, wakes its observer for it, and ends when it is complete; an item
/// that is pending then still comes.
#[test]
fn subject_gives_the_latest_item_and_ends_when_complete() {
    let subject = Subject::default();
    let mut items = std::pin::pin!(subject.observe());
    let woken = Arc::new(Flag::default());
    let waker = Waker::from(woken.clone());
    let mut next = || items.as_mut().poll_next(&mut Context::from_waker(&waker));
    let is_woken = || woken.0.swap(false, Ordering::Relaxed);

    assert_eq!(next(), Poll::Pending);
    assert!(!is_woken());
    subject.on_next(1);
    assert!(is_woken());
    assert_eq!(next(), Poll::Ready(Some(1)));
    assert_eq!(next(), Poll::Pending);
    subject.on_next(2);
    subject.on_next(3);
    assert_eq!(next(), Poll::Ready(Some(3)));
    assert_eq!(next(), Poll::Pending);
    is_woken();
    subject.on_completed();
    assert!(is_woken());
    assert_eq!(next(), Poll::Ready(None));

    let subject = Subject::default();
    subject.on_next('a');
    subject.on_completed();
    let items: String = stream::block_on(Box::pin(subject.observe())).collect();
    assert_eq!(items, "a");
}

// ---------------------------------------------------------------- the pipeline

/// The pipeline as it is in the program, with a window of 10 and commands that take so long; without a period
/// the clock never ticks. An event comes out when its command has ended, with the instant of its start.
fn pipeline(
    lines: &[(Time, &'static str)],
    end: Option<Time>,
    period: Option<u32>,
    run: Time,
) -> Marbles<(Time, String)> {
    let time = VirtualTime::new();
    let (delay, period) = period.map_or((100_000, 100_000), |period| (0, period));
    let clock = timer(time.clone(), delay * MS, period * MS).map(Tick);
    let events = clock.or(time.hot(lines, end).map(line));
    let events = events.debounce(time.clone(), 10 * MS, None, Event::reduce);
    let runs = events.then_latest(Event::reduce, |event| {
        let (start, due) = (time.0.now.get(), time.until(time.0.now.get() + run));
        async move {
            due.await;
            (start, event.text())
        }
    });
    observe(&time, 1_000, runs)
}

/// Each event that starts at once, at the instant in which it does.
fn at_once<const N: usize>(events: [(Time, &str); N]) -> Vec<(Time, (Time, String))> {
    events.map(|(at, event)| (at, (at, event.into()))).to_vec()
}

/// The pipeline ends with the lines, though its clock never does: first comes what is pending.
#[test]
fn the_pipeline_ends_when_the_lines_do() {
    let lines = [(20, "foo"), (205, "bar")];
    let events = at_once([(10, "0"), (30, "foo"), (110, "1"), (210, "bar")]);
    assert_eq!(pipeline(&lines, Some(210), Some(100), 0), (events, Some(210)));
    // the command under way is waited for, and then runs for what is pending
    let slow = pipeline(&lines[..1], Some(35), Some(100), 50);
    let ran = [(60, (10, "0".into())), (110, (60, "foo".into()))];
    assert_eq!(slow, (ran.to_vec(), Some(110)));
}

/// One line alone is observed whenever it comes, before a tick, with it or after it.
#[test]
fn a_lone_poke_beside_a_tick_is_observed() {
    for (poke, observed) in [(91, 110), (95, 110), (99, 110), (100, 110), (101, 111), (105, 115), (110, 120)]
    {
        let events = at_once([(10, "0"), (observed, "poke"), (210, "2")]);
        assert_eq!(pipeline(&[(poke, "poke")], Some(220), Some(100), 0), (events, Some(220)), "at {poke}");
    }
    // out of the tick's window: both
    let events = at_once([(10, "0"), (99, "poke"), (110, "1")]);
    assert_eq!(pipeline(&[(89, "poke")], Some(115), Some(100), 0), (events, Some(115)));
}

/// Without an interval there is no clock: lines are the only events.
#[test]
fn without_a_clock_lines_are_the_only_events() {
    let lines = [(20, "foo"), (205, "bar")];
    assert_eq!(pipeline(&lines, Some(500), None, 0), (at_once([(30, "foo"), (215, "bar")]), Some(500)));
    assert_eq!(pipeline(&[], Some(500), None, 0), (vec![], Some(500)));
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

    /// The reference model of `max_wait` and of events, millisecond by millisecond: a burst goes out when `window`
    /// has passed since its last item or `max_wait` since its first, as its last line, or else its last tick.
    #[test]
    fn debounce_of_events_equals_its_model(
        (items, end) in marbles(), window in 1..60u32, max_wait in prop::option::of(1..120u32)
    ) {
        let items: Vec<_> = items.into_iter().map(|(at, item)| (at, event(item))).collect();
        let (window_ms, wait_ms) = (Time::from(window), max_wait.map(Time::from));
        let last = items.last().map_or(0, |&(at, _)| at) + 200;
        let mut expected = Vec::new();
        let mut burst: Vec<&(Time, Event)> = Vec::new();
        for now in 0..=end.unwrap_or(last) {
            burst.extend(items.iter().filter(|&&(at, _)| at == now));
            let (Some(&(first, _)), Some(newest)) = (burst.first(), burst.last()) else { continue };
            let is_due = now >= newest.0 + window_ms || wait_ms.is_some_and(|wait| now >= first + wait);
            if is_due || end == Some(now) {
                let line = burst.iter().rfind(|(_, event)| matches!(event, Event::Line(_)));
                expected.push((now, line.unwrap_or(newest).1.clone()));
                burst.clear();
            }
        }
        prop_assert_eq!(debounced_with(&items, end, window, max_wait, Event::reduce), (expected, end));
    }

    /// The reference model of `then_latest`, millisecond by millisecond: first what comes joins what is pending, then
    /// a run ends, then the next one begins, and the end is where nothing is left.
    #[test]
    fn then_latest_equals_its_model((items, end) in marbles(), longest in 0..80u64) {
        // A run's length is in its item: such runs are shorter and longer than the gaps.
        let items: Vec<_> =
            items.into_iter().map(|(at, item)| (at, vec![Time::from(item) % (longest + 1)])).collect();
        let (mut expected, mut ended) = (Vec::new(), None);
        let (mut running, mut pending) = (None::<(Time, Time, Vec<Time>)>, Vec::new());
        for now in 0..9_000 {
            pending.extend(items.iter().filter(|&&(at, _)| at == now).flat_map(|(_, item)| item.clone()));
            loop {
                if let Some((start, _, item)) = running.take_if(|(_, due, _)| *due == now) {
                    expected.push((now, (start, item)));
                }
                if running.is_some() || pending.is_empty() {
                    break;
                }
                running = Some((now, now + pending.iter().max().unwrap(), mem::take(&mut pending)));
            }
            if running.is_none() && end.is_some_and(|end| end <= now) {
                ended = Some(now);
                break;
            }
        }
        let join = |earlier: Vec<_>, later: Vec<_>| [earlier, later].concat();
        prop_assert_eq!(runs(&items, end, join, |item| *item.iter().max().unwrap()), (expected, ended));
    }
}

/// A line or a tick, evenly.
fn event(number: u32) -> Event {
    if number.is_multiple_of(2) { line(&number.to_string()) } else { Tick(number.into()) }
}
