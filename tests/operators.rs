//! The operators in virtual time, where no test sleeps: marble diagrams, those of `debounce` after RxPY's own
//! tables (`tests/test_observable/test_debounce.py`), then any input against plain models.

#[allow(dead_code)]
#[path = "../main.rs"]
mod smolrx;

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::mem;
use std::pin::pin;
use std::rc::Rc;
use std::sync::LazyLock;
use std::task::{Poll, Waker};
use std::time::{Duration, Instant};

use futures_lite::future::{self, BoxedLocal};
use futures_lite::stream::{self, Stream, StreamExt};
use proptest::prelude::*;
use smol::LocalExecutor;
use smolrx::Event::{self, Line, Tick};
use smolrx::rx::{RxExt, Scheduler, Subject, timer};

// ---------------------------------------------------------------- virtual time

/// An instant in virtual time, in milliseconds.
type Time = u64;

const MS: Duration = Duration::from_millis(1);

/// When an observer has seen enough.
const HORIZON: Time = 10_000;

/// The real time at which virtual time begins.
static START: LazyLock<Instant> = LazyLock::new(Instant::now);

/// What a stream does: its items with their instants, and when it ends, if it does.
type Marbles<T> = (Vec<(Time, T)>, Option<Time>);

/// Time stands still until the test moves it; timers wake their tasks when it does.
#[derive(Clone, Default)]
struct VirtualTime(Rc<Shared>);

#[derive(Default)]
struct Shared {
    now: Cell<Time>,
    timers: RefCell<Vec<(Time, Waker)>>,
    /// How many timers were set by operators.
    set: Cell<usize>,
}

impl VirtualTime {
    /// Milliseconds since the start.
    fn elapsed(&self) -> Time {
        self.0.now.get()
    }

    fn advance_to(&self, now: Time) {
        self.0.now.set(now);
        let mut timers = self.0.timers.borrow_mut();
        timers.extract_if(.., |(due, _)| *due <= now).for_each(|(_, task)| task.wake());
    }

    /// Ready with this value from `due` on.
    fn until<T: 'static>(&self, due: Time, value: T) -> BoxedLocal<T> {
        let time = self.clone();
        Box::pin(async move {
            poll_fn(|cx| {
                if time.elapsed() >= due {
                    return Poll::Ready(());
                }
                time.0.timers.borrow_mut().push((due, cx.waker().clone()));
                Poll::Pending
            })
            .await;
            value
        })
    }

    /// A hot source of these marbles.
    fn hot<T: Clone + 'static>(&self, (items, end): &Marbles<T>) -> impl Stream<Item = T> + use<T> {
        let end = self.until(end.unwrap_or(Time::MAX), ());
        let time = self.clone();
        let items = stream::iter(items.clone()).then(move |(at, item)| time.until(at, item));
        items.chain(stream::once_future(end).filter_map(|()| None))
    }

    /// Observes a stream. It is polled only when it was woken, so a lost wake-up is a lost item here as it
    /// would be in the program.
    fn observe<S: Stream>(&self, stream: S) -> Marbles<S::Item> {
        let (items, end) = (RefCell::new(Vec::new()), Cell::new(None));
        let executor = LocalExecutor::new();
        let observer = async {
            stream.for_each(|item| items.borrow_mut().push((self.elapsed(), item))).await;
            end.set(Some(self.elapsed()));
        };
        executor.spawn(observer).detach();
        loop {
            while executor.try_tick() {}
            let next = self.0.timers.borrow().iter().map(|(due, _)| *due).min();
            match next {
                Some(next) if next <= HORIZON => self.advance_to(next),
                _ => return (items.take(), end.get()),
            }
        }
    }
}

impl Scheduler for VirtualTime {
    type Timer = BoxedLocal<()>;

    fn now(&self) -> Instant {
        *START + Duration::from_millis(self.elapsed())
    }

    fn at(&self, due: Instant) -> BoxedLocal<()> {
        self.0.set.update(|count| count + 1);
        self.until((due - *START).as_millis() as Time, ())
    }
}

// ---------------------------------------------------------------- marble diagrams

/// Marbles as RxJS draws them, a column a millisecond: `-` is nothing, `|` the end, and what is in
/// parentheses comes at the instant of the `(`.
fn drawn(diagram: &str) -> Marbles<char> {
    let (mut items, mut end, mut group) = (Vec::new(), None, None);
    for (column, marble) in (0..).zip(diagram.chars()) {
        let at = group.unwrap_or(column);
        match marble {
            '-' => {}
            '(' => group = Some(at),
            ')' => group = None,
            '|' => end = Some(at),
            item => items.push((at, item)),
        }
    }
    (items, end)
}

/// Checks diagrams: a source, and below it what comes of it by the operator named on each line.
#[track_caller]
fn check(diagrams: &str) {
    let mut source = None;
    for line in diagrams.lines().filter(|line| !line.trim().is_empty()) {
        let (name, diagram) = line.rsplit_once(' ').unwrap();
        let marbles = drawn(diagram);
        let Some((operator, arguments)) = name.trim().split_once('(') else {
            source = Some((line, marbles));
            continue;
        };
        let time = VirtualTime::default();
        let (above, source) = source.as_ref().expect("a source is above");
        let source = time.hot(source);
        let arguments = arguments.trim_end_matches(')').split(", ").map(|number| number.parse().unwrap());
        let outcome = match (operator, &arguments.collect::<Vec<u32>>()[..]) {
            ("debounce", &[window]) => time.observe(source.debounce(time.clone(), window * MS, None, later)),
            ("debounce", &[window, longest]) => {
                time.observe(source.debounce(time.clone(), window * MS, Some(longest * MS), later))
            }
            ("then_latest", &[run]) => time.observe(runs(&time, source, later, |_| run.into())),
            _ => panic!("no operator: {line}"),
        };
        assert_eq!(outcome, marbles, "\n{above}\n{line}");
    }
}

/// What Rx keeps of a burst.
fn later<T>(_: T, later: T) -> T {
    later
}

/// `then_latest` with futures that take as long as `run` says, and give back their item.
fn runs<T: 'static>(
    time: &VirtualTime,
    source: impl Stream<Item = T>,
    reduce: fn(T, T) -> T,
    run: impl Fn(&T) -> Time,
) -> impl Stream<Item = T> {
    source.then_latest(reduce, move |item| time.until(time.elapsed() + run(&item), item))
}

// ---------------------------------------------------------------- debounce

/// An item comes out once `window` of silence follows it or its burst has lasted for the longest wait, and at
/// once when the source ends (RxPY's `test_debounce`); at a tie the source goes first.
#[test]
fn debounce_ends_a_burst_by_silence_or_the_longest_wait() {
    check(
        "
        evenly spaced          2----3----4----5----6----7----8----|
        debounce(4)            ----2----3----4----5----6----7----8|
        debounce(4, 99)        ----2----3----4----5----6----7----8|
        debounce(6)            -----------------------------------(8|)
        debounce(6, 12)        ------------4--------------7-------(8|)
        some drop              2---------3-4-----5-----678---------|
        debounce(5)            -----2-----------4-----5-------8----|
        never ends             1-2
        debounce(3)            -----2
        comes as a window ends 1----2-------|
        debounce(5)            ----------2--|
        ",
    );
}

/// An item whose silence or longest wait is over comes out before the next one is taken: after a stop of
/// the process, and equally in a flood.
#[test]
fn debounce_does_not_hide_a_due_item_behind_the_next() {
    for (pause, max_wait, bursts) in [(100, None, [100, 200]), (1, Some(50 * MS), [51, 102])] {
        let time = VirtualTime::default();
        let clock = time.clone();
        let items = stream::repeat_with(move || {
            clock.advance_to(clock.elapsed() + pause);
            clock.elapsed()
        });
        let debounced = items.take(1_000).debounce(time.clone(), 10 * MS, max_wait, later);
        assert_eq!(time.observe(debounced.take(2)).0, bursts.map(|item| (item, item)));
    }
}

/// A flood sets one timer a window, not one an item.
#[test]
fn debounce_does_not_set_a_timer_for_each_item() {
    let time = VirtualTime::default();
    let flood = time.hot(&((0..1_000).map(|at| (at, at)).collect(), None));
    let (items, _) = time.observe(flood.debounce(time.clone(), 100 * MS, None, later));
    assert_eq!(items, [(1_099, 999)]);
    assert!(time.0.set.get() <= 12, "{} timers", time.0.set.get());
}

/// The event of a burst is its last line, even an empty one; its last tick, only if it has no line.
#[test]
fn a_tick_never_replaces_a_line() {
    for text in ["foo", ""] {
        let line = Line(text.into());
        for earlier in [Tick(1), Line("bar".into())] {
            assert_eq!(Event::reduce(earlier, line.clone()), line);
        }
        assert_eq!(Event::reduce(line.clone(), Tick(1)), line);
    }
    assert_eq!(Event::reduce(Tick(2), Tick(1)), Tick(1));
}

// ---------------------------------------------------------------- then_latest

/// One future runs at a time, then the one of the latest item that came meanwhile; the end waits for both.
#[test]
fn then_latest_runs_one_at_a_time_and_then_the_latest() {
    check(
        "
        ends when all is done  abc-----------------d---------|
        then_latest(5)         -----a----c--------------d----|
        ends with one pending  abc|
        then_latest(5)         -----a----(c|)
        comes as a run ends    ab---c|
        then_latest(5)         -----a----(c|)
        as futures-lite's then ab|
        then_latest(0)         ab|
        ",
    );
}

// ---------------------------------------------------------------- timer and subject

/// `timer(delay, period)` counts from 0: first after the delay, and then each period. A late timer counts on
/// one by one, and once it has missed a tick starts the period anew, as in RxPY.
#[test]
fn timer_does_not_make_up_for_missed_ticks() {
    let time = VirtualTime::default();
    let mut ticks = pin!(timer(time.clone(), 50 * MS, 100 * MS));
    let mut next = || future::block_on(future::poll_once(ticks.next()));
    for (due, late, count) in
        [(50, 0, 0), (150, 30, 1), (250, 0, 2), (350, 90, 3), (450, 1_080, 4), (1_630, 0, 5)]
    {
        time.advance_to(due - 1);
        assert_eq!(next(), None, "before {due}");
        time.advance_to(due + late);
        assert_eq!(next(), Some(Some(count)));
        assert_eq!(next(), None, "after {due}");
    }
}

/// The subject holds the latest item alone, wakes its observer for it, and ends when it is complete; an item
/// that is pending then still comes.
#[test]
fn subject_gives_the_latest_item_and_ends_when_complete() {
    for pending in [Some(4), None] {
        let subject = Subject::default();
        let seen = RefCell::new(Vec::new());
        let executor = LocalExecutor::new();
        let items = subject.observe().map(Some).chain(stream::once(None));
        executor.spawn(items.for_each(|item| seen.borrow_mut().push(item))).detach();
        // What is new to the observer, which is polled only when it was woken.
        let news = || {
            while executor.try_tick() {}
            seen.take()
        };
        assert_eq!(news(), []);
        for (items, latest) in [(&[1][..], 1), (&[2, 3], 3)] {
            items.iter().for_each(|&item| subject.on_next(item));
            assert_eq!(news(), [Some(latest)]);
        }
        pending.inspect(|&item| subject.on_next(item));
        subject.on_completed();
        assert_eq!(news(), pending.map_or(vec![None], |item| vec![Some(item), None]));
    }
}

// ---------------------------------------------------------------- any input

/// Items at instants that never fall. Each is a list of one, so that `joined` shows what a burst is made of.
fn any_marbles() -> impl Strategy<Value = Marbles<Vec<Time>>> {
    let gaps = prop::collection::vec((0..40u64, 0..1_000u64), 0..40);
    (gaps, prop::option::of(0..100u64)).prop_map(|(gaps, after)| {
        let mut at = 0;
        let items: Vec<_> = gaps.into_iter().map(|(gap, item)| (at += gap, (at, vec![item])).1).collect();
        (items, after.map(|after| at + after))
    })
}

fn joined(earlier: Vec<Time>, later: Vec<Time>) -> Vec<Time> {
    [earlier, later].concat()
}

proptest! {
    /// The model of `debounce`, millisecond by millisecond: a burst goes out when the window has passed since
    /// its last item or the longest wait since its first, and at the end; all its items go out, and no others.
    #[test]
    fn debounce_equals_its_model(
        source in any_marbles(), window in 1..60u32, longest in prop::option::of(1..120u32)
    ) {
        let (items, end) = &source;
        let last = items.last().map_or(0, |&(at, _)| at) + 200;
        let mut expected = Vec::new();
        let mut burst: Vec<&(Time, Vec<Time>)> = Vec::new();
        for now in 0..=end.unwrap_or(last) {
            burst.extend(items.iter().filter(|&&(at, _)| at == now));
            let (Some((first, _)), Some((newest, _))) = (burst.first(), burst.last()) else { continue };
            let is_due = now >= newest + Time::from(window)
                || longest.is_some_and(|longest| now >= first + Time::from(longest));
            if is_due || *end == Some(now) {
                expected.push((now, burst.drain(..).flat_map(|(_, item)| item.clone()).collect()));
            }
        }
        let time = VirtualTime::default();
        let max_wait = longest.map(|longest| longest * MS);
        let bursts = time.hot(&source).debounce(time.clone(), window * MS, max_wait, joined);
        prop_assert_eq!(time.observe(bursts), (expected, *end));
    }

    /// The model of `then_latest`, millisecond by millisecond: first what comes joins what is pending, then a
    /// run ends, then the next one begins, and the end is where nothing is left.
    #[test]
    fn then_latest_equals_its_model(source in any_marbles(), longest in 0..80u64) {
        // Runs that are shorter and longer than the gaps.
        let run = |item: &Vec<Time>| item.iter().sum::<Time>() % (longest + 1);
        let (items, end) = &source;
        let (mut expected, mut ended) = (Vec::new(), None);
        let (mut running, mut pending) = (None::<(Time, Vec<Time>)>, Vec::new());
        for now in 0..9_000 {
            pending.extend(items.iter().filter(|&&(at, _)| at == now).flat_map(|(_, item)| item));
            loop {
                expected.extend(running.take_if(|(due, _)| *due == now));
                if running.is_some() || pending.is_empty() {
                    break;
                }
                running = Some((now + run(&pending), mem::take(&mut pending)));
            }
            if running.is_none() && end.is_some_and(|end| end <= now) {
                ended = Some(now);
                break;
            }
        }
        let time = VirtualTime::default();
        prop_assert_eq!(time.observe(runs(&time, time.hot(&source), joined, run)), (expected, ended));
    }
}
