//! The command line: each option with its values, what is refused and in which words, and what is warned of.

mod common;

use common::*;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::thread;
use std::time::Instant;

/// The options in the order of `--help`, each with what is said of its default.
const OPTIONS: [(&str, &str); 13] = [
    ("--tcp-port", "[8888]"),
    ("--interval", "[60000]"),
    ("--debounce", "[a tenth of --interval"),
    ("--max-wait", "[none]"),
    ("--bind", "[0.0.0.0]"),
    ("--keep-open", ""),
    ("--max-conns", "[512]"),
    ("--max-line", "[2048]"),
    ("--timeout", "[60000]"),
    ("-q, --quiet", ""),
    ("--health", ""),
    ("-h, --help", ""),
    ("-V, --version", ""),
];

/// Runs the program, which must refuse its command line: exit code 2, nothing on stdout, one short line on
/// stderr that ends with a hint at `--help`. Returns that line without its beginning and its end.
#[track_caller]
fn refusal_of(options: &[impl AsRef<OsStr>]) -> String {
    let mut command = program("");
    command.args(options);
    let exit = run(command);
    let short = |line: &String| line.chars().take(400).collect::<String>();
    let said: Vec<String> = exit.stderr.iter().take(5).map(short).collect();
    assert_eq!((exit.code, exit.stdout.len(), exit.stderr.len()), (Some(2), 0, 1), "{said:?}");
    let line = &said[0];
    assert!(line.chars().count() < 200 && !line.contains(is_hostile), "{line:?}");
    let message = line.strip_prefix("smolrx: ").and_then(|line| line.strip_suffix("; see smolrx --help"));
    message.unwrap_or_else(|| panic!("not `smolrx: ...; see smolrx --help`: {line:?}")).into()
}

// ------------------------------------------------------------ help and version

/// `--help` prints every option with its default, in the order of `OPTIONS`, and what a command gets.
#[test]
fn help_lists_every_option_in_order() {
    let lines = run(program("--help")).stdout;
    let widest = lines.iter().map(|line| line.chars().count()).max();
    assert!(widest <= Some(80), "wider than a terminal: {widest:?}");
    let help = lines.join("\n");
    for word in ["-- COMMAND [ARG]...", "SMOLRX_EVENT", "0 for no clock"] {
        assert!(help.contains(word), "{word} is not in the help:\n{help}");
    }
    let mut rest = &*help;
    for (name, default) in OPTIONS {
        let behind = rest.split_once(&format!("\n  {name} "));
        rest = behind.unwrap_or_else(|| panic!("{name} is not in its place:\n{help}")).1;
        let text = rest.split("\n  -").next().unwrap();
        assert!(text.contains(default), "{name} without its default {default}: {text}");
    }
}

/// The first `--help` or `--version`, short or long, wins over whatever follows it, and over nothing else:
/// an earlier mistake is refused, after an option that needs a value it is that value, and after `--` it is the
/// command's.
#[test]
fn help_and_version_win_over_what_follows() {
    let help = run(program("--help")).stdout;
    let version = vec![concat!("smolrx ", env!("CARGO_PKG_VERSION")).to_owned()];
    for (first, text) in [("-h", &help), ("--help", &help), ("-V", &version), ("--version", &version)] {
        for rest in ["", "--frobnicate", "--interval", "--tcp-port x", "--", "-h", "-V", "x"] {
            let exit = run(program(&format!("--keep-open {first} {rest}")));
            assert_eq!((exit.code, exit.stderr.len()), (Some(0), 0), "{first} {rest}: {exit:?}");
            assert_eq!(exit.stdout, *text, "{first} {rest}");
        }
        assert_eq!(refusal_of(&["--frobnicate", first]), "unknown option '--frobnicate'");
        assert_eq!(
            refusal_of(&["--tcp-port", first]),
            format!("option '--tcp-port' takes a whole number from 0 to 65535, not '{first}'")
        );
        // Dropped, and so killed: a stop would run the command.
        Server::calm(&format!("-- {first}"));
    }
}

// ---------------------------------------------------------------------- values

/// Values are taken as `--name VALUE` and as `--name=VALUE`, and the last one of an option counts.
#[test]
fn last_value_counts_in_either_form() {
    let others = "--keep-open --keep-open --tcp-port=1 --bind=127.0.0.2 --interval=99999 --debounce=99999 \
        --max-wait=99999 --max-conns=9 --max-line=99 --timeout=99999";
    let apart = |options: &str| options.replace('=', " ");
    // Each of them lets events out.
    for waits in ["--debounce=1", "--debounce=99999 --max-wait=1"] {
        let values = format!(
            "--tcp-port=0 --bind=127.0.0.1 --interval=10 --max-conns=1 --max-line=9 --timeout=99 {waits}"
        );
        for options in [format!("{others} {}", apart(&values)), format!("{} {values}", apart(others))] {
            let mut server = Server::start(&options);
            assert_eq!(server.address.ip().to_string(), "127.0.0.1");
            assert_ne!(server.address.port(), 1);
            server.stdout.wait_for_count(5); // where it serves, and four events
            server.echo("12345678\n");
            let (mut silent, mut over) = (server.connect(), server.connect());
            over.send("123456789\n");
            over.until_closed();
            // Its turn came when the timeout had closed the other one.
            assert!(!silent.hears_nothing_for(ms(1)), "{options}");
            assert_eq!(silent.until_closed(), b"");
            let from = format!("smolrx: line from 127.0.0.1:{}", over.port());
            let message = format!("{from} is longer than 9 bytes; --max-line allows more");
            server.stderr.wait_for(&message);
            assert_eq!(server.stop().stderr, [message], "{options}");
        }
    }
}

/// Values at both ends of their range are taken, and serve.
#[test]
fn values_at_the_ends_of_their_range() {
    let smallest =
        "--interval 0|--interval 10|--debounce 1|--max-wait 1|--max-conns 1|--max-line 1|--timeout 1";
    let largest = "--interval 4294967295 --debounce 4294967295 --max-wait 4294967295 \
        --max-conns 4294967295 --max-line 4294967295 --timeout 4294967295";
    for options in smallest.split('|').chain([largest]) {
        let mut server = Server::start(options);
        // A millisecond may be too short for a client.
        if options != "--timeout 1" {
            server.echo("\n"); // all that `--max-line 1` takes
        }
        thread::sleep(ms(50)); // long enough for a sum that overflows
        assert_eq!(server.stop().stderr, [""; 0], "{options}");
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
        ("--max-line", "a whole number of bytes from 1 to 4294967295", "0|4294967296|2k"),
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

// -------------------------------------------------------------- what is refused

/// Whatever is no option is named as typed, UTF-8 or not, and for `--port` the option that was meant. A value
/// that is missing, that is given to a flag, or that is wrong although a right one follows, is refused, too.
#[test]
fn wrong_options_are_named_as_typed() {
    // The arguments are parted by a blank, command lines with the same message by `|`; `{}` is one of them.
    let cases: [(&[u8], &str); 16] = [
        (b"--frobnicate|--Interval|--interva|--intervals|---interval|-x|-", "unknown option '{}'"),
        (b"--quiet\t", r"unknown option '--quiet\t'"),
        (b"--port|-p", "unknown option '{}'; the port is set by --tcp-port"),
        (b"-qV|-hq|-Vh|-interval|-q=1|-\xff\x1b", "unknown option '{}'; give short options one by one"),
        (b"./sync.sh|8888|", "unexpected argument '{}'; a command follows '--'"),
        (b"--frobnicate=3", "unknown option '--frobnicate'"),
        (b"--port=8888", "unknown option '--port'; the port is set by --tcp-port"),
        (b"--keep-open=yes", "option '--keep-open' takes no value"),
        (b"--quiet=1|--quiet=", "option '--quiet' takes no value"),
        (b"--health=8888", "option '--health' takes no value"),
        (b"--=./sync.sh ./sync.sh", "option '--' takes no value"),
        (b"--", "no command follows '--'"),
        (b"--tcp-port x --tcp-port 0", "option '--tcp-port' takes a whole number from 0 to 65535, not 'x'"),
        (b"--bind \xff", "option '--bind' takes an IPv4 or IPv6 address, not '\u{fffd}'"),
        (b"--tcp-port 0\xff", "option '--tcp-port' takes a whole number from 0 to 65535, not '0\u{fffd}'"),
        (b"--\xff=1", "unknown option '--\u{fffd}'"),
    ];
    for (command_lines, message) in cases {
        for line in command_lines.split(|&byte| byte == b'|') {
            let arguments = line.split(|&byte| byte == b' ').map(OsStr::from_bytes);
            let behind = ["--tcp-port", "0", "--health"].map(OsStr::new).into_iter().chain(arguments.clone());
            let message = message.replace("{}", &shown(line));
            assert_eq!(refusal_of(&Vec::from_iter(arguments)), message);
            assert_eq!(refusal_of(&Vec::from_iter(behind)), message);
        }
    }
    for (option, _) in OPTIONS.iter().filter(|(_, default)| !default.is_empty()) {
        assert_eq!(refusal_of(&["-q", option]), format!("option '{option}' needs a value"));
    }
}

/// A message is one line of under 200 characters whatever it is about: what is long is cut, and what could
/// break the line or talk to the terminal is escaped.
#[test]
fn message_is_one_short_line_whatever_is_typed() {
    let hostile = "foo\nsmolrx: all is well\r\u{1b}[2J\u{1b}]0;owned\u{7}\t\u{9b}\u{85}\u{202e}\u{2066}\u{2028}\u{2029}bar";
    let long =
        [b"x", "🦀".as_bytes(), b"1", b"\x1b", b"\xff\xfe\x80"].map(|text| text.repeat(100_000 / text.len()));
    for text in long.iter().map(Vec::as_slice).chain([hostile.as_bytes()]) {
        let behind = |before: &str| refusal_of(&[OsStr::from_bytes(&[before.as_bytes(), text].concat())]);
        // In each place where a message quotes what was typed.
        for before in ["", "-", "--", "--port", "-p", "--frobnicate=", "--quiet=", "--health="] {
            behind(before);
        }
        for option in ["--tcp-port", "--interval", "--debounce", "--max-conns", "--max-line", "--bind"] {
            let apart = refusal_of(&[OsStr::new(option), OsStr::from_bytes(text)]);
            assert!(apart.starts_with(&format!("option '{option}' takes ")), "{apart}");
            assert_eq!(behind(&format!("{option}=")), apart);
        }
    }
    let message = refusal_of(&[hostile]);
    assert!(message.starts_with(r"unexpected argument 'foo\u{a}smolrx: all is well\r\u{1b}[2J"), "{message}");
    let message = refusal_of(&[OsStr::from_bytes(&long[0])]);
    assert!(message.starts_with("unexpected argument 'xxxxxxxxxxxxxxxxxxxx"), "{message}");
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
    let warning = "smolrx: --debounce is not below --interval: without --max-wait, a burst may never end";
    for (options, warnings) in [(warned, &[warning][..]), (silent, &[])] {
        for options in options.split('|') {
            let started = Instant::now();
            let mut server =
                Server::on_loopback(program(&format!("--tcp-port 0 --bind 127.0.0.1 {options}")));
            server.stderr.wait_for_count(warnings.len());
            assert!(started.elapsed() < ms(5000), "{options}: after {:?}", started.elapsed());
            server.echo("foo\n");
            assert_eq!(server.stop().stderr, warnings, "{options}");
        }
    }
}
