//! `smolrx [OPTION]... -- COMMAND [ARG]...`: what the command gets, when it runs, and how it ends.

mod common;

use common::*;
use rustix::process::{Pid, Signal, kill_process};
use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::process::Command;
use std::thread;
use std::time::Instant;

/// A free port of the loopback interface, no clock, and each poke an event.
const POKED: &str = "--bind 127.0.0.1 --tcp-port 0 --interval 0 --debounce 1";

/// A script that tells its event.
const TELLS: &str = r#"printf '%s\n' "$SMOLRX_EVENT""#;

/// A script that tells its beginning, a signal that ends it, and its end, which comes once stdin is closed.
const HELD: &str = r#"trap 'echo got TERM; exit' TERM
    trap 'echo got INT; exit' INT
    echo "begin $SMOLRX_EVENT"
    read -r _
    echo "end $SMOLRX_EVENT""#;

/// A server that runs this command for each poke.
fn with_command(options: &str, command: &[&str]) -> Command {
    let mut server = program(&format!("{POKED} {options} --"));
    server.args(command);
    server
}

/// A server that runs this script for each poke, and prints nothing but the script's output.
fn with_script(options: &str, script: &str) -> Server {
    with_script_after("true", options, script)
}

/// The same, started by a shell after `setup`.
fn with_script_after(setup: &str, options: &str, script: &str) -> Server {
    Server::on_loopback(after(setup, &with_command(&format!("-q {options}"), &["sh", "-c", script])))
}

/// Pokes such a server, and waits for the line that it prints next.
fn poke(server: &Server, line: impl AsRef<[u8]>) -> String {
    let count = server.stdout.lines().len();
    server.echo(line);
    server.stdout.wait_until("the next line", |lines| lines.get(count).cloned())
}

/// A folder in which a shell has made files. (A program that this process has written can't be run while what
/// another test starts at that moment still has it open.)
fn folder_with(files: &str) -> PathBuf {
    let folder = scratch();
    assert_eq!(refusal(Command::new("sh").args(["-ec", files]).current_dir(&folder)), None);
    folder
}

/// Waits until a server has this many children, zombies included.
fn wait_for_children(server: &Server, count: usize) {
    let children = || server.tasks("children").concat();
    eventually(PATIENCE, &format!("{count} children"), || children().split_whitespace().count() == count);
}

// ------------------------------------------------------- what the command gets

/// The command finds the event in `SMOLRX_EVENT`, a line as the transcript shows it, whatever a client sends.
#[test]
fn event_is_in_the_environment() {
    let server = with_script("", r#"printf '<%s>\n' "$SMOLRX_EVENT""#);
    let text = "foo\n\n   \n0\n-rf\n--help\n--\nSMOLRX_EVENT=x\nPATH=/nowhere\n=\n$(touch x) `id` \"'; exit\n\
        two  spaces\tand a tab\nünï→☃\nesc \x1b[31m and nul \0 and cr \r within\n\
        \u{202e}right to left\u{2028}\n%s %n \\0 \\n\nlast\n";
    let text = [text.as_bytes(), b"\xff\xfe no UTF-8 \xc3\n"].concat();
    for line in text.split_inclusive(|&byte| byte == b'\n') {
        assert_eq!(poke(&server, line), format!("<{}>", shown(line)), "the event of {line:?}");
    }
    assert_eq!(server.stderr.lines(), [""; 0]);
}

/// A script prints the same in a run as in the server's place, after the same `setup`, beside clients or not.
#[track_caller]
fn is_given_the_same(setup: &str, script: &str) {
    let arguments =
        b"\xff\xfe||--help|-V|--health|--|-q|--interval|--tcp-port=99999999|a b|line\nend|$D|*|\x1b[31m";
    let arguments = arguments.split(|&byte| byte == b'|').map(OsStr::from_bytes);
    let given = |command: &mut Command| {
        after(setup, command.args(["sh", "-c", script, "sh"]).args(arguments.clone()))
    };
    let mut in_its_place = given(Command::new("env").envs(MALLOC));
    let mut printed = run(in_its_place.env("SMOLRX_EVENT", "poke")).stdout;
    let mut command = given(&mut with_command("-q", &[]));
    let mut server = Server::on_loopback(command.env("SMOLRX_EVENT", "an older one"));
    server.echo("poke\n");
    server.stdout.wait_for_count(1);
    let clients = server.clients(100, "half");
    clients[99].wait_until_taken();
    server.echo("poke\n");
    server.stdout.wait_for_count(printed.len() + 1);
    clients.into_iter().for_each(Client::reset);
    printed.extend_from_within(..);
    assert_eq!(server.stop().stdout, printed);
}

/// The command has the server's environment to the byte, with one `SMOLRX_EVENT`; its arguments exactly, be
/// they not UTF-8, empty, or like options of the server; and of descriptors the three standard ones alone.
#[test]
fn environment_arguments_and_descriptors_are_exact() {
    let setup = r"export SMOLRX_EVENTS=1 SMOLRX_EVEN=2 XSMOLRX_EVENT=3 EMPTY= NOT_UTF_8=$(printf '\377\376')
        export LINES=$(printf 'a\nb=c')";
    let script = r#"tr '\0' '\n' < /proc/$$/environ | grep -av ^_= | cat -v | sort
        printf '<%s>\n' "$@" | cat -v; ls -1 /proc/self/fd"#;
    is_given_the_same(setup, script);
}

/// The command has the server's folder, mask for new files, process group and session; signals as they were
/// when the server was started, blocked, ignored (but for SIGPIPE) or at their default; and the limits of
/// descriptors of that moment, though the server has raised its own and has more in use.
#[test]
fn folder_group_limits_and_signals_are_as_before() {
    // `exec`, as a shell that has run another program blocks no signal any more.
    let script = "pwd; umask; ulimit -Sn; ulimit -Hn
        exec grep -E '^(SigBlk|SigIgn|SigPnd|ShdPnd|NSpgid|NSsid):' /proc/self/status";
    for signals in [
        "",
        "--block-signal=INT,TERM,HUP,CHLD,PIPE,XFSZ,USR1 --ignore-signal=USR2",
        "--ignore-signal=INT,QUIT,TERM,HUP,XFSZ",
    ] {
        let limits = "ulimit -Sn 64; ulimit -Hn 1024";
        is_given_the_same(&format!("cd /usr; umask 027; {limits}; exec env {signals} \"$0\" \"$@\""), script);
    }
}

/// A server without any environment finds the command where a shell looks then, and gives it the event alone.
#[test]
fn empty_environment() {
    let mut server = Server::on_loopback(with_command("-q", &["env"]).env_clear());
    server.echo("poke\n");
    let exit = server.stop();
    assert_eq!((exit.stdout, exit.stderr), (vec!["SMOLRX_EVENT=poke".into()], vec![]));
}

/// The command's standard input is the server's, without the events: each run goes on where the one before
/// has stopped reading, and one that reads all of it, as ssh does, takes no event from those that follow.
#[test]
fn stdin_is_the_servers() {
    let script = r#"case $SMOLRX_EVENT in all*) text=$(cat);; *) read -r text;; esac
        echo "$SMOLRX_EVENT <$text>""#;
    let mut server = with_script("", script);
    server.stdin().write_all(b"one\ntwo\nthree\n").unwrap();
    for (event, text) in [("a", "one"), ("b", "two"), ("all", "three"), ("all again", ""), ("c", "")] {
        assert_eq!(poke(&server, format!("{event}\n")), format!("{event} <{text}>"));
    }
}

/// A run needs no descriptor that clients could take from it: with all of them in use, it works.
#[test]
fn run_with_no_descriptor_left() {
    let server = with_script_after("ulimit -n 64", "--keep-open", TELLS);
    let mut clients = server.clients(80, "");
    server.stderr.wait_for_count(1);
    for i in 0..5 {
        clients[0].send(format!("{i}\n"));
        server.stdout.wait_for_count(i + 1);
    }
    assert_eq!(server.stdout.lines(), ["0", "1", "2", "3", "4"]);
    let is_full = |line: &String| line.starts_with("smolrx: cannot accept: ");
    assert!(server.stderr.lines().iter().all(is_full), "{:?}", server.stderr);
}

// ------------------------------------------------------------- one run at a time

/// Runs never overlap, and of what comes during one the latest poke is run next, once: it replaces the tick
/// that waits, and no tick replaces it. Then the clock goes on, and does not make up for the ticks meanwhile.
#[test]
fn latest_event_is_run_next() {
    let mut server = with_script("--interval 10", HELD);
    server.stdout.wait_for_count(1);
    thread::sleep(ms(100)); // a tick is pending
    for i in 0..10 {
        server.echo(format!("poke {i}\n"));
        thread::sleep(ms(20)); // each an event of its own
    }
    thread::sleep(ms(300)); // thirty ticks
    assert_eq!(server.stdout.lines().len(), 1);
    drop(server.stdin());
    server.stdout.wait_for_count(5);
    let lines = server.stdout.lines();
    let tick = |i: usize| lines[i].strip_prefix("begin ").unwrap().parse::<u64>().unwrap();
    assert_eq!(lines[1..4], [format!("end {}", tick(0)), "begin poke 9".into(), "end poke 9".into()]);
    // A busy machine's clock leaves some out, and never so many of sixty.
    assert!(tick(4) >= tick(0) + 8, "{lines:?}");
}

/// A run that lasts, as nobody reads its output, delays no echo, no health check and no idle client's end,
/// and costs no time; what is pending is run once somebody reads. (`head` ends `yes` by SIGPIPE.)
#[test]
fn long_run_delays_nobody() {
    let script = format!("yes \"line of $SMOLRX_EVENT\" | head -n 100000; {TELLS} >&2");
    let mut server = with_script("--timeout 1000", &script);
    server.stdout.pause();
    server.echo("first\n");
    let mut idle = server.client_in("half");
    let start = Instant::now();
    while start.elapsed() < ms(3000) {
        let sent = Instant::now();
        server.echo("meanwhile\n");
        assert!(sent.elapsed() < ms(1000), "an echo took {:?}", sent.elapsed());
        thread::sleep(ms(10));
    }
    server.echo("last\n");
    assert_healthy(server.address.port());
    assert_eq!(idle.until_closed(), b"", "the idle client");
    let busy = server.busy_during(ms(500));
    assert!(busy < ms(100), "busy for {busy:?} of half a second");
    assert_eq!(server.stderr.lines(), [""; 0], "the run has ended though its output is not read");
    server.stdout.resume();
    server.stderr.wait_for("last");
    let exit = server.stop();
    // `yes` itself would have a word to say without SIGPIPE.
    let output = exit.stderr.into_iter().flat_map(|event| vec![format!("line of {event}"); 100_000]);
    assert!(output.eq(exit.stdout), "the output is not whole");
}

/// What a run prints comes behind the line of its event, each time, and its end is noticed at once, however
/// short the run, even where the parent blocks SIGCHLD.
#[test]
fn output_comes_behind_its_event() {
    let command = with_command("--interval 10", &["sh", "-c", "echo ran; exit 1"]);
    for setup in ["true", "exec env --block-signal=CHLD \"$0\" \"$@\""] {
        let mut server = Server::of(after(setup, &command));
        server.stdout.wait_for_count(400);
        let exit = server.stop();
        for pair in exit.stdout[1..].chunks(2) {
            assert!(pair[0].starts_with("Observing ") && pair[1] == "ran", "{pair:?}");
        }
        assert_eq!(exit.stderr, vec!["smolrx: the command exited with 1"; exit.stdout.len() / 2]);
    }
}

/// A run that fails is reported in a sentence, even with `--quiet`, and is not repeated.
#[test]
fn failed_run_is_reported() {
    let mut server = with_script("", r#"echo x; eval "$SMOLRX_EVENT""#);
    let exits = [3, 1, 255, 137].map(|code| (format!("exit {code}"), format!("exited with {code}")));
    // SIGABRT (6) may dump a core; 40 and 64 are real-time signals.
    let kills = [9, 15, 2, 6, 40, 64]
        .map(|signal| (format!("kill -{signal} $$"), format!("was ended by signal {signal}")));
    let sigchld = ("kill -17 $$; exit 4".into(), "exited with 4".into());
    let mut expected = vec![];
    for (event, end) in exits.into_iter().chain(kills).chain([sigchld]) {
        poke(&server, format!("{event}\n"));
        expected.push(format!("smolrx: the command {end}"));
        server.stderr.wait_for_count(expected.len());
    }
    poke(&server, "exit 0\n");
    let exit = server.stop();
    assert_eq!(exit.stderr, expected);
    assert_eq!(exit.stdout.len(), 12);
}

/// A run that fails is reported although it ends while the server looks for other children that have ended.
#[test]
fn failed_run_is_reported_though_it_ends_in_the_middle_of_reaping() {
    let mut server = with_script("", &format!("{HELD}\nexit 3"));
    poke(&server, "poke\n");
    let Some(strace) = strace("wait4:delay_exit=1000000") else { return }; // µs
    let _strace = server.traced_by(strace);
    server.signal(Signal::CHILD);
    thread::sleep(ms(200)); // it has found none, and is held up
    drop(server.stdin());
    server.stderr.wait_for("smolrx: the command exited with 3");
}

// ------------------------------------------------------------------------ the end

/// After a signal the server waits for the run under way, longer than for its clients, then runs the latest
/// event, here a line that its client completes meanwhile, and ends with 0.
#[test]
fn signal_waits_for_the_run_and_runs_what_is_pending() {
    let mut server = with_script("", HELD);
    poke(&server, "first\n");
    server.echo("second\n");
    let mut client = server.client_in("thi");
    server.signal(Signal::TERM);
    server.wait_until_refused();
    client.send("rd\n");
    assert_eq!(client.rest(), b"third\n");
    thread::sleep(ms(7000));
    assert_eq!(server.stdout.lines(), ["begin first"]);
    drop(server.stdin());
    let exit = server.exited(ms(6000));
    assert_eq!((exit.code, exit.stderr.len()), (Some(0), 0), "{exit:?}");
    assert_eq!(exit.stdout, ["begin first", "end first", "begin third", "end third"]);
}

/// A signal brings about the run of the event that the debounce holds, and none without one; a failure of
/// that run is reported before the end, which is with 0 all the same, unless the command is not there.
#[test]
fn signal_runs_what_the_debounce_holds() {
    let fails = ["sh", "-c", "sleep 0.1; echo \"ran $SMOLRX_EVENT\"; echo \"its own word\" >&2; exit 3"];
    let reports = &["its own word", "smolrx: the command exited with 3"];
    for (command, pokes, code, said, told) in [
        (&fails[..], &[][..], 0, &[][..], &[][..]),
        (&fails, &["a"], 0, &["ran a"], reports),
        (&fails, &["a", "b", "c"], 0, &["ran c"], reports),
        (&["no-such"], &["a"], 127, &[], &["smolrx: cannot run no-such: not found (error 2)"]),
    ] {
        for _ in 0..10 {
            let mut server = Server::on_loopback(with_command("-q --debounce 600000", command));
            pokes.iter().for_each(|poke| _ = server.echo(format!("{poke}\n")));
            server.signal(Signal::TERM);
            let exit = server.exited(ms(6000));
            assert_eq!(exit.code, Some(code), "{exit:?}");
            assert_eq!([exit.stdout, exit.stderr], [said, told]);
        }
    }
}

/// The second signal, and only that, is passed on to the command, even one in a session of its own, and ends
/// the server at once with 128 + its number.
#[test]
fn second_signal_is_passed_on_and_ends_it() {
    let (term, int) = (Signal::TERM, Signal::INT);
    let held = ["sh", "-c", HELD];
    let in_a_session = ["sh", "-c", "exec setsid sh -c \"$0\"", HELD];
    for (command, first, second, code, got) in [
        (&held[..], int, term, 143, "got TERM"),
        (&held, term, int, 130, "got INT"),
        (&in_a_session, int, term, 143, "got TERM"),
    ] {
        let mut server = Server::on_loopback(with_command("-q", command));
        assert_eq!(poke(&server, "poke\n"), "begin poke");
        server.signal_twice(first, second);
        let exit = server.exited(ms(2000));
        assert_eq!((exit.code, exit.stderr.len()), (Some(code), 0), "{command:?}, {first:?}: {exit:?}");
        assert_eq!(exit.stdout, ["begin poke", got], "{command:?}, {first:?}");
    }
}

/// A command that ignores signals, or is stopped, or has filled an output that nobody reads, delays neither
/// the end by a second signal nor that by an output whose reader closes it, silent and with 141.
#[test]
fn command_delays_no_end() {
    let ignores = "trap '' TERM; exec > /dev/null; echo $$ >&2; exec 2>&1; read -r _";
    let stops = "exec > /dev/null; echo $$ >&2; exec 2>&1; kill -STOP $$";
    let fills = "echo $$ >&2; exec 2> /dev/null; yes"; // which ends with the pipe
    for (script, code) in [(ignores, 143), (ignores, 141), (stops, 143), (stops, 141), (fills, 143)] {
        let (reader, writer) = io::pipe().unwrap();
        let mut server = Server::on_loopback(with_command("", &["sh", "-c", script]).stdout(writer));
        server.echo("poke\n");
        let pid = server.stderr.wait_until("the run's number", |lines| lines.first().cloned());
        thread::sleep(ms(100)); // now the output is full
        server.echo("more\n"); // which cannot be written there
        if code == 143 {
            server.signal_twice(Signal::TERM, Signal::TERM);
        } else {
            drop(reader);
        }
        let exit = server.exited(ms(2000));
        assert_eq!((exit.code, &exit.stderr), (Some(code), &vec![pid.clone()]), "{script}");
        // What is stopped goes on, to its SIGTERM or its end. (What has ended already can't be signalled.)
        let _ = kill_process(Pid::from_raw(pid.parse().unwrap()).unwrap(), Signal::CONT);
    }
}

/// Ctrl-C in a terminal reaches both: the command, which may end by it, and the server, which then ends well.
#[test]
fn ctrl_c_reaches_both() {
    let (screen, end) = terminal();
    let mut keys = screen.try_clone().unwrap();
    let screen = Transcript::of(screen);
    // The terminal that is to control the session is the one under stdin.
    let mut command = after("exec setsid -c \"$0\" \"$@\" <&1", &with_command("-q", &["sh", "-c", HELD]));
    let mut server = Server::on_loopback(command.stdout(end));
    server.echo("poke\n");
    screen.wait_for("begin poke");
    keys.write_all(b"\x03").unwrap();
    assert_eq!(server.exited(ms(6000)).code, Some(0), "{screen:?}");
    screen.wait_for("^Cgot INT"); // the terminal shows the key
}

// ------------------------------------------------------------------ what is left behind

/// As process 1 it reaps what runs leave behind, be it a hundred children that end at once during a run,
/// which is not over then; those who stay do not delay the end, which SIGHUP brings about, too.
#[test]
fn process_1_reaps_orphans() {
    let script = r#"i=0; while [ $i -lt 100 ]; do ((sleep 0.5; exit 3) &) > /dev/null 2>&1; i=$((i + 1)); done
        sleep 1000 > /dev/null 2>&1 &"#;
    let command = with_command("", &["sh", "-c", &format!("{script}\n{HELD}")]);
    let Some(mut server) = as_process_one("true", &command) else { return };
    server.echo("first\n");
    server.stdout.wait_for("begin first");
    server.echo("second\n");
    wait_for_children(&server, 1);
    thread::sleep(ms(200));
    assert_eq!(observed(&server.stdout.lines()), ["first"]);
    drop(server.stdin());
    server.stdout.wait_for("end second");
    wait_for_children(&server, 2); // those who stay
    server.signal(Signal::HUP);
    let exit = server.exited(ms(6000));
    assert_eq!((exit.code, exit.stderr.len()), (Some(0), 0), "{exit:?}");
    assert_eq!(observed(&exit.stdout), ["first", "second"]);
}

/// Without a command it reaps the children of the program that it has replaced, as process 1 and elsewhere,
/// even one that has ended before that, of which no signal tells.
#[test]
fn reaps_without_a_command() {
    if let Some(reason) = refusal(Command::new("perl").args(["-e", ""])) {
        return skip(format!("no perl: {reason}"));
    }
    let inherited = "(sleep 0.1; exit 7) & (sleep 0.3; exit 8) & (sleep 0.2 &) & sleep 0.5 & true";
    // (A shell would wait for its child.)
    let zombie = r#"exec perl -e '$SIG{CHLD} = sub { $ended = 1 }; fork or exit 8;
        select undef, undef, undef, 0.01 until $ended; exec @ARGV' "$0" "$@""#;
    let elsewhere = [inherited, zombie].map(|setup| Server::on_loopback(after(setup, &program(POKED))));
    for server in elsewhere.into_iter().chain(as_process_one(inherited, &program(POKED))) {
        wait_for_children(&server, 0);
        server.echo("poke\n");
        assert_eq!(server.stderr.lines(), [""; 0]);
    }
}

/// A run is over when the command ends: not when it closes its output or at a stray SIGCHLD, and no later
/// because what it has left behind keeps the output open.
#[test]
fn run_is_over_when_the_command_ends() {
    let script = r#"sleep 60 & echo "ran $SMOLRX_EVENT"; exec 3<&0 <&- >&- 2>&-; read -r _ <&3; exit 0"#;
    let mut server = Server::of(with_command("", &["sh", "-c", script]));
    server.echo("first\n");
    server.stdout.wait_for("ran first");
    server.echo("second\n");
    (0..100).for_each(|_| server.signal(Signal::CHILD));
    thread::sleep(ms(200));
    assert_eq!(observed(&server.stdout.lines()), ["first"]);
    drop(server.stdin());
    server.stdout.wait_for("ran second");
    assert_eq!(server.stderr.lines(), [""; 0]);
}

/// Three hundred runs, and as many that could not be started, leave no descriptor, memory or child behind.
#[test]
fn runs_leak_nothing() {
    let server = with_script("--max-line 300000", TELLS);
    poke(&server, "x\n");
    wait_for_children(&server, 0);
    let (descriptors, threads) = (server.descriptors(), server.threads());
    let memory = [30, 100, 100, 100].map(|runs| {
        server.stderr.clear();
        for i in 1..=runs {
            poke(&server, "x\n");
            server.echo(line_of(140_001));
            server.stderr.wait_for_count(i);
        }
        wait_for_children(&server, 0);
        eventually(PATIENCE, "no descriptor is left", || server.descriptors() == descriptors);
        assert_eq!(server.threads(), threads);
        server.memory_kb()
    });
    // A leak grows each time. That more buffers than before meet in a moment happens once or twice.
    assert!(memory.windows(2).any(|pair| pair[1] <= pair[0] + 50), "{memory:?} kB");
}

/// A server whose parent ignores SIGCHLD notices each run's end, even beside another child, and ends well.
#[test]
fn ignored_sigchld_hides_no_end() {
    for others in ["true", "sleep 60 > /dev/null 2>&1 &"] {
        // `env` comes last: a shell has a handler of its own.
        let setup = format!("{others}\nexec env --ignore-signal=CHLD \"$0\" \"$@\"");
        let mut server = with_script_after(&setup, "", TELLS);
        let start = Instant::now();
        for event in ["a", "b", "c"] {
            assert_eq!(poke(&server, format!("{event}\n")), event);
        }
        assert!(start.elapsed() < ms(5000), "two ends took {:?}", start.elapsed());
        assert_eq!(server.stop().stdout, ["a", "b", "c"], "beside {others}");
    }
}

// --------------------------------------------------------------- what can't be started

/// A command that is not found, may not be run, is no program, or has a name that no file can have, ends the
/// server at the first event with the shells' code and a sentence, which is one harmless line.
#[test]
fn command_that_cannot_be_started_ends_it() {
    let folder = folder_with(
        "echo '#!/no/such/interpreter' > interpreter; head -c 1000 /dev/zero > zeros; : > empty
        echo 'echo no interpreter is named' > text; chmod +x *
        echo '#!/bin/sh' > closed; mkdir folder; ln -s itself itself",
    );
    let not_found = "smolrx-no-such|./no/such|/no/such|--help|./\x1b[31m\u{202e}|./interpreter";
    let not_there = format!("|/dev/null/x|/dev/null|{}|/{}|./itself|/", "x".repeat(300), "x/".repeat(3000));
    for (codes, why, commands) in [
        (&[127][..], "not found (error 2)", not_found),
        (&[126], "permission denied (error 13)", "./closed|./folder"),
        (&[126], "(error 8)", "./zeros|./empty|./text"),
        (&[126, 127], "", &not_there),
    ] {
        for command in commands.split('|') {
            let mut started = with_command("", &[command, "--argument"]);
            let mut server = Server::on_loopback(started.current_dir(&folder));
            let port = server.echo("poke\n");
            let exit = server.exited(ms(6000));
            let what = format!("{command:.60}: {exit:?}");
            assert_eq!(exit.stdout[1..4], conversation("poke", port), "{what}");
            assert!(codes.contains(&exit.code.unwrap()) && exit.stderr.len() == 1, "{what}");
            let beginning = format!("smolrx: cannot run {:.60}", shown(command.as_bytes()));
            assert!(exit.stderr[0].starts_with(&beginning) && exit.stderr[0].ends_with(why), "{what}");
        }
    }
}

/// The command is looked for along PATH, past what is no folder, may not be run, or is not there.
#[test]
fn path_is_searched() {
    let folder = folder_with(
        r"mkdir first second third
        for folder in first second third .; do
            printf '#!/bin/sh\necho %s\n' $folder > $folder/smolrx-tool; chmod +x $folder/smolrx-tool
        done; chmod -x first/smolrx-tool",
    );
    let poked_with_path = |places: &str| {
        let mut command = with_command("-q", &["smolrx-tool"]);
        let server = Server::on_loopback(command.env("PATH", places).current_dir(&folder));
        server.echo("poke\n");
        server
    };
    for (places, says) in [
        ("first:third", "third"),
        (&format!("{}:second", folder.join("third").display()), "third"),
        (&format!("/no/such:/dev/null:/{}:second", "x".repeat(5000)), "second"),
        (":second", "."),
        ("/no/such::", "."),
    ] {
        let exit = poked_with_path(places).stop();
        assert_eq!((exit.stdout, exit.stderr), (vec![says.into()], vec![]), "{places:.100}");
    }
    assert_eq!(poked_with_path("first").exited(ms(6000)).code, Some(126));
}

/// An event is whole up to the system's limit, 128 KiB a variable; a longer one is reported and left out.
#[test]
fn long_event_is_whole_or_reported() {
    let mut server = with_script("--max-line 300000", TELLS);
    let fits = 131_072 - "SMOLRX_EVENT=\0".len();
    let line = |length: usize| -> String { ('a'..='z').cycle().take(length).collect() };
    let escaped = "\x7f".repeat(40_000); // six bytes for each
    for (i, long) in [line(fits + 1), line(299_000), escaped].into_iter().enumerate() {
        server.echo(long + "\n");
        server.stderr.wait_for_count(i + 1);
    }
    for long in [4096, 70_000, fits].map(line) {
        assert!(poke(&server, format!("{long}\n")) == long, "an event is not whole");
    }
    let exit = server.stop();
    assert_eq!(exit.stderr, ["smolrx: cannot run sh: too long for the system (error 7)"; 3]);
    assert_eq!(exit.stdout.len(), 3);
}

/// A run for which there is no process or no memory, or whose program is being written, is reported and left
/// out.
#[test]
fn run_that_is_left_out_is_reported() {
    let folder = folder_with("cp /bin/sh sh");
    let mut command = with_command("-q", &["./sh", "-c", TELLS]);
    let mut server = Server::on_loopback(command.current_dir(&folder));
    let is_told = |why: &str| server.stderr.wait_for(&format!("smolrx: cannot run ./sh: {why}"));
    let writer = File::options().append(true).open(folder.join("sh")).unwrap();
    server.echo("busy\n");
    is_told("unexpected (error 26)");
    drop(writer);

    for (error, why) in [("ENOMEM", "out of memory (error 12)"), ("EAGAIN", "no process is free (error 11)")]
    {
        let Some(mut strace) = strace(&format!("clone,clone3,fork,vfork:error={error}")) else { return };
        strace.arg("-f");
        let strace = server.traced_by(strace);
        server.echo("meanwhile\n");
        is_told(why);
        drop(strace);
    }
    assert_eq!(poke(&server, "after\n"), "after");
    assert_eq!(server.stop().stdout, ["after"]);
}
