//! The command line: each option with its values, what is refused and in which words, and what is warned of.

mod common;

use common::*;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::thread;
use std::time::Instant;

/// The options in the order of `--help`, each with what is said of its default.
const OPTIONS: [(&str, &str); 11] = [
    ("--tcp-port", "[8888]"),
    ("--interval", "[60000]"),
    ("--debounce", "[a tenth of --interval"),
    ("--max-wait", "[none]"),
    ("--bind", "[0.0.0.0]"),
    ("--keep-open", ""),
    ("--max-conns", "[512]"),
    ("--max-line", "[2048]"),
    ("--timeout", "[60000]"),
    ("--quiet", ""),
    ("--health", ""),
];

/// Runs the program, which must refuse its command line: exit code 2, nothing on stdout, one short line on
/// stderr that ends with a hint at `--help`. Returns that line without its beginning and its end.
#[track_caller]
fn refusal_of(options: &[impl AsRef<OsStr>]) -> String {
    let mut command = program(&[]);
    command.args(options);
    let exit = Process::spawn(command).exited(PATIENCE);
    let short = |text: &str| text.chars().take(400).collect::<String>();
    let said: Vec<String> = exit.stderr.iter().take(5).map(|line| short(line)).collect();
    assert_eq!((exit.code, exit.signal), (Some(2), None), "{said:?}");
    assert_eq!(exit.stdout, [""; 0]);
    assert_eq!(exit.stderr.len(), 1, "{} lines: {said:?}", exit.stderr.len());
    let line = &exit.stderr[0];
    assert!(line.chars().count() < 200, "{} bytes: {said:?}", line.len());
    assert!(!line.contains(is_hostile), "{said:?}");
    let message = line.strip_prefix("smolrx: ").and_then(|line| line.strip_suffix("; see smolrx --help"));
    message.unwrap_or_else(|| panic!("not `smolrx: ...; see smolrx --help`: {said:?}")).into()
}

// ------------------------------------------------------------ help and version

/// `-h` and `--help` print every option with its default, in the order of the table, and what a command gets.
#[test]
fn help_lists_every_option_in_order() {
    for option in ["-h", "--help"] {
        let exit = run(&[option]);
        assert_eq!((exit.code, exit.stderr.len()), (Some(0), 0), "{exit:?}");
        let mut rest = &exit.stdout[..];
        for (name, default) in OPTIONS {
            // A line that begins with the option; a usage line above may name it too.
            let is_its_line = |line: &String| {
                let line = line.trim_start();
                line.strip_prefix("-q, ").unwrap_or(line).starts_with(name)
            };
            let at = rest.iter().position(is_its_line);
            let at = at.unwrap_or_else(|| panic!("{name} is not in its place: {exit:#?}"));
            let next = rest[at + 1..].iter().position(|line| line.trim_start().starts_with('-'));
            let text = rest[at..at + 1 + next.unwrap()].join(" ");
            assert!(text.contains(default), "{name} without its default {default}: {text}");
            rest = &rest[at + 1..];
        }
        let all = exit.stdout.join("\n");
        for word in ["-q,", "-h,", "-V,", "-- COMMAND [ARG]...", "SMOLRX_EVENT", "0 for no clock"] {
            assert!(all.contains(word), "{word} is not in the help:\n{all}");
        }
        let widest = exit.stdout.iter().map(|line| line.chars().count()).max();
        assert!(widest <= Some(80), "wider than a terminal: {widest:?}");
    }
}

/// `-V` and `--version` print the version.
#[test]
fn version() {
    for option in ["-V", "--version"] {
        let exit = run(&[option]);
        assert_eq!((exit.code, exit.stderr.len()), (Some(0), 0), "{exit:?}");
        assert_eq!(exit.stdout, [concat!("smolrx ", env!("CARGO_PKG_VERSION"))]);
    }
}

/// The first `--help` or `--version` wins over whatever follows it, and over nothing else: a mistake before
/// it is refused, as the value of an option it is none, and behind `--` it is the command's.
#[test]
fn help_and_version_win_over_what_follows() {
    for first in ["-h", "--help", "-V", "--version"] {
        let alone = run(&[first]).stdout;
        for rest in ["--frobnicate", "--interval", "--tcp-port x", "--", "-h", "-V", "x"] {
            let rest: Vec<&str> = rest.split(' ').collect();
            let exit = run(&[&["--keep-open", first], &rest[..]].concat());
            assert_eq!((exit.code, exit.stderr.len()), (Some(0), 0), "{first} {rest:?}: {exit:?}");
            assert_eq!(exit.stdout, alone, "{first} {rest:?}");
        }
        assert_eq!(refusal_of(&["--frobnicate", first]), "unknown option '--frobnicate'");
        assert_eq!(
            refusal_of(&["--tcp-port", first]),
            format!("option '--tcp-port' takes a whole number from 0 to 65535, not '{first}'")
        );
        // Not stopped, but killed: the command must not run.
        Server::start(&calm(&["--", first]));
    }
}

// ---------------------------------------------------------------------- values

/// Values are taken as `--name VALUE` and as `--name=VALUE`.
#[test]
fn values_follow_a_blank_or_an_equals_sign() {
    let values =
        "--bind=127.0.0.1 --interval=10 --debounce=1 --max-wait=5 --max-conns=1 --max-line=9 --timeout=99";
    for options in [values.to_string(), values.replace('=', " ")] {
        let mut server = Server::start(&options.split(' ').collect::<Vec<_>>());
        assert_eq!(server.address.ip().to_string(), "127.0.0.1");
        server.stdout.wait_for("Observing 3");
        server.echo("12345678\n");
        let mut silent = server.connect();
        assert_eq!(silent.until_closed(), b"", "the timeout closes it");
        let mut over = server.connect();
        over.send("123456789\n");
        over.until_closed();
        let from = format!("smolrx: line from 127.0.0.1:{}", over.port());
        server.stderr.wait_for(&format!("{from} is longer than 9 bytes; --max-line allows more"));
        server.stop();
    }
    let mut process = Process::spawn(program(&["--tcp-port=0"]));
    process.stdout.wait_for_count(1);
    process.stop();
}

/// Values at both ends of their range are taken, alone and together, and serve.
#[test]
fn values_at_the_ends_of_their_range() {
    let smallest =
        "--interval 0|--interval 10|--debounce 1|--max-wait 1|--max-conns 1|--max-line 1|--timeout 1";
    let largest = "--interval 4294967295|--debounce 4294967295|--max-wait 4294967295|\
        --max-conns 4294967295|--max-line 4294967294|--timeout 4294967295";
    let all = largest.replace('|', " ");
    for options in smallest.split('|').chain(largest.split('|')).chain([&*all]) {
        let mut server = Server::start(&options.split(' ').collect::<Vec<_>>());
        if options != "--timeout 1" {
            // One that can be served in a millisecond and has only a byte.
            server.echo("\n");
        }
        thread::sleep(ms(50)); // long enough for a sum that overflows
        assert!(server.is_running(), "{options}: {:?}", server.exited(PATIENCE));
        let exit = server.stop();
        let warnings = usize::from(options == "--debounce 4294967295");
        assert_eq!(exit.stderr.len(), warnings, "{options}: {exit:?}");
    }
}

/// A value that an option does not take is refused and quoted as it was typed, with the blanks around it; the
/// message says what the option takes, with the range and the unit of a number.
#[test]
fn values_out_of_their_range_are_refused() {
    let milliseconds = "a whole number of milliseconds from 1 to 4294967295";
    // The values that it does not take are parted by `|`.
    let cases = [
        ("--tcp-port", "a whole number from 0 to 65535", "65536"),
        (
            "--interval",
            "0 or a whole number of milliseconds from 10 to 4294967295",
            "1|9|09|4294967296|2s|1000ms",
        ),
        ("--debounce", milliseconds, "0|4294967296"),
        ("--max-wait", milliseconds, "0|4294967296"),
        ("--timeout", milliseconds, "0|00|4294967296"),
        ("--max-conns", "a whole number from 1 to 4294967295", "0|4294967296"),
        ("--max-line", "a whole number of bytes from 1 to 4294967294", "0|4294967295|2k"),
        (
            "--bind",
            "an IPv4 or IPv6 address",
            "localhost|1.2.3|1.2.3.4.5|1.2.3.256|127.0.0.1:8888|[::1|::1]|[[::1]]|[]|[::1]:8888|::1%lo|\
            [::1%lo]|*|:::|--tcp-port| ::1",
        ),
    ];
    let never = "|x|-1|+50|1.5|1e3|0x50|50 000| 50|50 | |١٠٠|18446744073709551615|18446744073709551666|\
        99999999999999999999999999999999999999999999|--keep-open|--";
    for (option, takes, values) in cases {
        for value in values.split('|').chain(never.split('|')) {
            let sentence = format!("option '{option}' takes {takes}, not '{value}'");
            assert_eq!(refusal_of(&["--keep-open", option, value]), sentence);
            assert_eq!(refusal_of(&[&format!("{option}={value}"), "--keep-open"]), sentence);
        }
    }
}

/// An option may be given again, in either form; the last value counts, and a wrong one counts wherever it
/// stands.
#[test]
fn last_value_counts() {
    let twice = "--tcp-port 1 --tcp-port=0 --keep-open --keep-open --interval 99999 --debounce=1 --bind 0.0.0.0 \
        --max-line 99 --max-conns=1 --max-line=4 --interval=10 --bind=127.0.0.1 -q --quiet --max-conns 9";
    let mut command = program(&[]);
    command.args(twice.split(' '));
    let mut process = Process::spawn(command);
    process.stdout.wait_for("3");
    let address = process.listening_address();
    let (_waiting, mut over) = (Client::connect(address), Client::connect(address));
    over.send("123\n");
    over.expect("123\n");
    over.send("1234\n");
    assert_eq!(over.until_closed(), b"");
    process.stderr.wait_for_count(1);
    let message = &process.stop().stderr[0];
    assert!(message.ends_with(" is longer than 4 bytes; --max-line allows more"), "{message}");
    assert_eq!(
        refusal_of(&["--interval", "2s", "--interval", "2000"]),
        "option '--interval' takes 0 or a whole number of milliseconds from 10 to 4294967295, not '2s'"
    );
}

// -------------------------------------------------------------- what is refused

/// Whatever is no option gets one sentence that names it as typed, and the option that was meant.
#[test]
fn wrong_options_are_named_as_typed() {
    // The arguments are parted by a blank.
    let cases = [
        ("--frobnicate", "unknown option '--frobnicate'"),
        ("--frobnicate=3", "unknown option '--frobnicate'"),
        ("--tcp-port 0 --Interval 50", "unknown option '--Interval'"),
        ("--interva 50", "unknown option '--interva'"),
        ("--intervals=50", "unknown option '--intervals'"),
        ("---interval 50", "unknown option '---interval'"),
        ("-x", "unknown option '-x'"),
        ("-", "unknown option '-'"),
        ("--port 8888", "unknown option '--port'; did you mean --tcp-port?"),
        ("--port=8888", "unknown option '--port'; did you mean --tcp-port?"),
        ("--port", "unknown option '--port'; did you mean --tcp-port?"),
        ("-p 8888", "unknown option '-p'; did you mean --tcp-port?"),
        ("-qV", "unknown option '-qV'; give short options one by one"),
        ("-hq", "unknown option '-hq'; give short options one by one"),
        ("-Vh", "unknown option '-Vh'; give short options one by one"),
        ("-interval 50", "unknown option '-interval'; give short options one by one"),
        ("-q=1", "unknown option '-q=1'; give short options one by one"),
        ("./sync.sh", "unexpected argument './sync.sh'; a command follows '--'"),
        ("--keep-open 8888", "unexpected argument '8888'; a command follows '--'"),
        ("--interval 50  --tcp-port 0", "unexpected argument ''; a command follows '--'"),
        ("--health 8888", "unexpected argument '8888'; a command follows '--'"),
        ("--keep-open=yes", "option '--keep-open' takes no value"),
        ("--quiet=1", "option '--quiet' takes no value"),
        ("--quiet=", "option '--quiet' takes no value"),
        ("--health=8888", "option '--health' takes no value"),
        ("--=./sync.sh ./sync.sh", "option '--' takes no value"),
        ("--", "no command follows '--'"),
        ("-q --", "no command follows '--'"),
        ("--health --", "no command follows '--'"),
    ];
    for (options, message) in cases {
        assert_eq!(refusal_of(&options.split(' ').collect::<Vec<_>>()), message, "{options}");
    }
    assert_eq!(refusal_of(&["--quiet "]), "unknown option '--quiet '");
    for (option, _) in OPTIONS.iter().filter(|(_, default)| !default.is_empty()) {
        assert_eq!(refusal_of(&["-q", option]), format!("option '{option}' needs a value"));
    }
}

/// A message is one line of under 200 characters whatever it is about: what is long is cut, and what could
/// break the line or talk to the terminal is escaped.
#[test]
fn message_is_one_short_line_whatever_is_typed() {
    let long = "x".repeat(100_000);
    let wide = "🦀".repeat(25_000);
    let digits = "1".repeat(100_000);
    let escapes = "\u{1b}".repeat(10_000);
    let bytes = b"\xff\xfe\x80".repeat(30_000);
    let hostile = "foo\nsmolrx: all is well\r\u{1b}[2J\u{1b}]0;owned\u{7}\t\u{9b}\u{85}\u{202e}\u{2066}\u{2028}\u{2029}bar";
    let texts =
        [long.as_bytes(), wide.as_bytes(), digits.as_bytes(), escapes.as_bytes(), &bytes, hostile.as_bytes()];
    for text in texts {
        // In each place where a message quotes what was typed, alone and attached.
        for prefix in ["", "-", "--", "--port", "-p"] {
            refusal_of(&[OsStr::from_bytes(&[prefix.as_bytes(), text].concat())]);
        }
        for option in ["--tcp-port", "--interval", "--debounce", "--max-conns", "--max-line", "--bind"] {
            let message = refusal_of(&[OsStr::new(option), OsStr::from_bytes(text)]);
            assert!(message.starts_with(&format!("option '{option}' takes ")), "{message}");
            refusal_of(&[OsStr::from_bytes(&[option.as_bytes(), b"=", text].concat())]);
        }
        for attached in ["--frobnicate=", "--quiet=", "--health="] {
            refusal_of(&[OsStr::from_bytes(&[attached.as_bytes(), text].concat())]);
        }
    }
    let message = refusal_of(&[hostile]);
    let start = r"unexpected argument 'foo\u{a}smolrx: all is well\r\u{1b}[2J\u{1b}";
    assert!(message.starts_with(start), "{message}");
    assert!(refusal_of(&[&long]).starts_with("unexpected argument 'xxxxxxxxxxxxxxxxxxxx"));
}

/// An argument that is not even text is refused like any other.
#[test]
fn argument_that_is_not_utf8_is_refused() {
    for (options, message) in [
        ([&b"--bind"[..], b"\xff"], "option '--bind' takes an IPv4 or IPv6 address, not '\u{fffd}'"),
        (
            [b"--tcp-port", b"0\xff"],
            "option '--tcp-port' takes a whole number from 0 to 65535, not '0\u{fffd}'",
        ),
        ([b"--quiet", b"-\xff\x1b"], "unknown option '-\u{fffd}\\u{1b}'; give short options one by one"),
        ([b"--quiet", b"--\xff=1"], "unknown option '--\u{fffd}'"),
    ] {
        assert_eq!(refusal_of(&options.map(OsStr::from_bytes)), message);
    }
}

// -------------------------------------------------------------- what is warned of

/// A debounce that is not below the interval, without a longest wait, never lets a burst end: a warning at
/// the start, before any client comes, names the three options, and the server serves.
#[test]
fn debounce_that_starves_is_warned_of() {
    let warned = "--interval 1000 --debounce 1000|--interval 1000 --debounce 1001|\
        --interval 10 --debounce 4294967295|--debounce 60000|--debounce 60000 -q";
    let silent = "--interval 1000 --debounce 999|--interval 1000 --debounce 1000 --max-wait 5000|\
        --interval 0 --debounce 4294967295|--interval 0|--interval 10|--debounce 59999|--interval 1000|-q";
    for (options, warnings) in [(warned, 1), (silent, 0)] {
        for options in options.split('|') {
            let mut command = program(&["--tcp-port", "0", "--bind", "127.0.0.1"]);
            command.args(options.split(' '));
            let started = Instant::now();
            let mut process = Process::spawn(command);
            process.stderr.wait_for_count(warnings);
            assert!(started.elapsed() < ms(5000), "{options}: after {:?}", started.elapsed());
            let mut client = Client::connect(process.listening_address());
            client.send("foo\n");
            assert_eq!(client.rest(), b"foo\n");
            let exit = process.stop();
            assert_eq!(exit.stderr.len(), warnings, "{options}: {exit:?}");
            for warning in exit.stderr {
                let names = ["--debounce", "--interval", "--max-wait"].iter();
                assert!(warning.starts_with("smolrx: "), "{warning}");
                assert!(names.copied().all(|name| warning.contains(name)), "{options}: {warning}");
            }
        }
    }
}
