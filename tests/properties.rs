//! For any bytes in any chunking with any pauses: what is echoed is what was received,
//! and what is printed is one escaped line an event.
//!
//! `PROPTEST_CASES=10000 cargo test --test properties` tries harder. What fails is shrunk, and
//! kept in `tests/properties.regressions` to be tried first from then on.

mod common;

use common::*;
use proptest::prelude::*;
use proptest::test_runner::{FileFailurePersistence, TestRunner};
use std::cell::RefCell;
use std::io::{self, Write};
use std::net::Shutdown;
use std::thread;

/// A piece of a client's input, and the milliseconds to wait after it.
type Chunk = (Vec<u8>, u64);

fn runner(cases: u32) -> TestRunner {
    let mut config = ProptestConfig::default(); // which reads the environment
    if std::env::var_os("PROPTEST_CASES").is_none() {
        config.cases = cases;
    }
    config.failure_persistence = Some(Box::new(FileFailurePersistence::WithSource("regressions")));
    config.source_file = Some(file!());
    TestRunner::new(config)
}

/// Bytes of every kind, but more of those that could matter. (Those of HTTP are `fuzz.rs`'s.)
fn bytes(longest: usize) -> impl Strategy<Value = Vec<u8>> {
    let piece = prop_oneof![
        4 => Just(b"\n".to_vec()),
        2 => Just(b"\r\n".to_vec()),
        1 => Just(b"\r".to_vec()),
        1 => Just(b"\0".to_vec()),
        1 => Just(b" ".to_vec()),
        1 => Just(b"\\".to_vec()),
        1 => Just("\u{feff}".into()),
        1 => Just(b"\x1b[31m".to_vec()),
        2 => any::<u8>().prop_map(|byte| vec![byte]),
        2 => any::<char>().prop_map(|c| c.to_string().into_bytes()),
        1 => "[\u{85}\u{a0}\u{61c}\u{200e}\u{200f}\u{2028}-\u{202e}\u{2066}-\u{2069}]".prop_map(String::into_bytes),
        2 => "[a-z]{1,8}".prop_map(String::into_bytes),
        1 => prop::collection::vec(0x80u8..=0xff, 1..5),
    ];
    prop::collection::vec(piece, 0..longest).prop_map(|pieces| pieces.concat())
}

/// Any bytes, cut anywhere (in the middle of a character, too), with pauses here and there.
fn chunks(longest: usize) -> impl Strategy<Value = Vec<Chunk>> {
    let cuts =
        prop::collection::vec((any::<prop::sample::Index>(), prop_oneof![3 => Just(0), 1 => 1u64..4]), 0..6);
    (bytes(longest), cuts).prop_map(|(bytes, mut cuts)| {
        cuts.sort_by_key(|(at, _)| at.index(bytes.len() + 1));
        let mut chunks = vec![];
        let mut start = 0;
        for (at, pause) in cuts {
            let at = at.index(bytes.len() + 1);
            chunks.push((bytes[start..at].to_vec(), pause));
            start = at;
        }
        chunks.push((bytes[start..].to_vec(), 0));
        chunks
    })
}

fn send(client: &mut Client, chunks: &[Chunk]) {
    send_while_open(client, chunks).expect("the server takes what is sent");
}

/// Sends the chunks and ends the sending side, unless the server has closed before.
fn send_while_open(client: &mut Client, chunks: &[Chunk]) -> io::Result<()> {
    for (bytes, pause) in chunks {
        client.0.write_all(bytes)?;
        if *pause > 0 {
            thread::sleep(ms(*pause));
        }
    }
    client.0.shutdown(Shutdown::Write)
}

/// The model: lines end after `\n`, and what is left at the end is one more.
fn lines(chunks: &[Chunk]) -> Vec<Vec<u8>> {
    let bytes: Vec<u8> = chunks.iter().flat_map(|(bytes, _)| bytes.clone()).collect();
    bytes.split_inclusive(|&byte| byte == b'\n').map(<[u8]>::to_vec).collect()
}

/// With `--keep-open` every line is echoed and printed, in order, and nothing else; the last one is observed.
#[test]
fn any_bytes_in_any_chunks_keep_open() {
    let mut server = Server::start(&calm(&["--keep-open"]));
    let events = RefCell::new(vec![]);
    let result = runner(120).run(&chunks(40), |chunks| {
        let before = server.stdout.lines().len();
        let lines = lines(&chunks);
        let mut client = server.connect();
        send(&mut client, &chunks);
        prop_assert_eq!(client.rest(), lines.concat());
        let mut printed: Vec<String> =
            lines.iter().flat_map(|line| conversation(&shown(line), client.port())[..2].to_vec()).collect();
        if !lines.is_empty() {
            printed.push(CLOSE.into());
        }
        server.stdout.wait_for_count(before + printed.len());
        prop_assert_eq!(&server.stdout.lines()[before..], printed);
        events.borrow_mut().extend(lines);
        Ok(())
    });
    result.unwrap_or_else(|e| panic!("{e}\n{:?}", server.stderr));
    let exit = server.stop();
    assert!(!exit.stdout.iter().any(|line| line.contains(is_hostile)));
    assert_eq!(exit.stderr, [""; 0]);
    let last = events.borrow().last().map_or("0".into(), |line| shown(line));
    assert_eq!(observed(&exit.stdout), [last]);
}

/// Without `--keep-open` the first line is served, whatever follows it.
#[test]
fn any_bytes_in_any_chunks_one_line() {
    let server = Server::start(&CALM);
    let result = runner(120).run(&chunks(12), |chunks| {
        let before = server.stdout.lines().len();
        let line = lines(&chunks).into_iter().next();
        let mut client = server.connect();
        // Once the first line is whole the server may close while the client still sends.
        let _ = send_while_open(&mut client, &chunks);
        prop_assert_eq!(client.until_closed(), line.clone().unwrap_or_default());
        let printed = line.map_or(vec![], |line| conversation(&shown(&line), client.port()).to_vec());
        server.stdout.wait_for_count(before + printed.len());
        prop_assert_eq!(&server.stdout.lines()[before..], printed);
        Ok(())
    });
    result.unwrap_or_else(|e| panic!("{e}\n{:?}", server.stderr));
}

/// Lines up to the first that is too long are received; that one gets its sentence, and nothing follows.
#[test]
fn any_bytes_up_to_a_line_that_is_too_long() {
    const LONGEST: usize = 12;
    let server = Server::start(&calm(&["--keep-open", "--max-line", "12"]));
    let result = runner(120).run(&chunks(40), |chunks| {
        let (before, complaints) = (server.stdout.lines().len(), server.stderr.lines().len());
        let lines = lines(&chunks);
        let served = lines.iter().take_while(|line| line.len() <= LONGEST).count();
        let mut client = server.connect();
        let _ = send_while_open(&mut client, &chunks);
        let echo = client.until_closed();
        // What had not reached the client when the connection was cut may be missing at the end.
        prop_assert!(lines[..served].concat().starts_with(&echo), "echoed: {:?}", echo);
        let printed: Vec<String> = lines[..served]
            .iter()
            .flat_map(|line| conversation(&shown(line), client.port())[..2].to_vec())
            .collect();
        server.stdout.wait_for_count(before + printed.len() + usize::from(served > 0));
        let mut got = server.stdout.lines()[before..].to_vec();
        got.retain(|line| line != CLOSE);
        prop_assert_eq!(got, printed);
        if served < lines.len() {
            let sentence = format!(
                "smolrx: line from 127.0.0.1:{} is longer than {LONGEST} bytes; --max-line allows more",
                client.port()
            );
            server.stderr.wait_for_count(complaints + 1);
            prop_assert_eq!(&server.stderr.lines()[complaints..], [sentence]);
        } else {
            prop_assert_eq!(server.stderr.lines().len(), complaints);
        }
        Ok(())
    });
    result.unwrap_or_else(|e| panic!("{e}\n{:?}", server.stderr));
}
