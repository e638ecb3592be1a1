//! Where the server listens, what `--quiet` prints, and that an idle server does nothing.

mod common;

use common::*;
use std::net::SocketAddr;
use std::thread;

/// It listens on 0.0.0.0; `--bind` takes another IPv4 or IPv6 address, in brackets or without. The first line
/// names the address and the port; clients of each family are served there, and shown as they know themselves.
#[test]
fn binds_to_an_address_of_either_family() {
    let cases = [
        ("", "0.0.0.0", &["127.0.0.1"][..]),
        ("--bind [127.0.0.1]", "127.0.0.1", &["127.0.0.1"]),
        ("--bind ::1", "::1", &["::1"]),
        ("--bind [0:0::1]", "::1", &["::1"]),
        ("--bind ::", "::", &["127.0.0.1", "::1"]),
    ];
    for (options, bound, from) in cases {
        if bound.contains(':') && no_ipv6(bound) {
            continue;
        }
        let server = Server::calm(options);
        let at = |ip: &str| SocketAddr::new(ip.parse().unwrap(), server.address.port());
        assert_eq!(server.stdout.lines()[0], format!("Serving on {}", at(bound)), "{options}");
        for ip in from {
            let mut client = Client::connect(at(ip));
            client.send("foo\n");
            assert_eq!(client.rest(), b"foo\n", "{options} from {ip}");
            server.stdout.wait_for(&format!("Received foo from {}", client.0.local_addr().unwrap()));
        }
    }
}

/// An address that cannot be had (another server has it, it is not this machine's, or it needs a scope) gets
/// one sentence on stderr and exit code 1; the other server goes on.
#[test]
fn address_that_cannot_be_had_gets_one_sentence() {
    let mut server = Server::calm("--bind 127.0.0.1");
    let port = server.address.port();
    let used = format!("127.0.0.1 --tcp-port {port}");
    for (ip, address, reasons) in [
        (&*used, format!("127.0.0.1:{port}"), "address in use"),
        ("192.0.2.1", "192.0.2.1:8888".into(), "address not available"),
        // A machine without IPv6 has other words.
        ("fe80::1", "[fe80::1]:8888".into(), "invalid argument|address family|address not available"),
    ] {
        let exit = run(program(&format!("--bind {ip}")));
        assert_eq!((exit.code, exit.stdout.len(), exit.stderr.len()), (Some(1), 0, 1), "{exit:?}");
        let beginning = |reason| format!("smolrx: cannot listen on {address}: {reason}");
        assert!(reasons.split('|').any(|reason| exit.stderr[0].starts_with(&beginning(reason))), "{exit:?}");
    }
    let port = server.echo("foo\n");
    server.stop().tells_of("foo", port);
}

/// With `--quiet` events are all that is printed: ticks, and lines without the blanks at their ends.
#[test]
fn quiet_prints_bare_events() {
    let mut server = Server::on_loopback(calm_on_loopback("--quiet --debounce 50"));
    server.stdout.wait_for_count(1);
    for (line, events) in ["foo\n", "\n", "  two words\t\n", "\r\n"].iter().zip(2..) {
        server.echo(line);
        server.stdout.wait_for_count(events);
    }
    server.echo("\n"); // which the stop flushes
    assert_eq!(server.stop().stdout, ["0", "foo", "", "two words", "", ""]);
}

/// An idle server, with a clock and connections or without, does not run at all between two ticks.
#[test]
fn idle_server_does_nothing() {
    let servers = [("12000", 3), ("0", 0)].map(|(interval, idle)| {
        let server = Server::start(&format!("--interval {interval} --keep-open"));
        let mut clients = server.clients(3, "");
        clients[0].send("foo\n");
        clients[0].expect("foo\n");
        clients.truncate(idle);
        (server, clients)
    });
    let at_rest = servers.each_ref().map(|(server, _)| {
        server.stdout.wait_for("Observing foo");
        server.comes_to_rest()
    });
    // A thread that makes a system call has to run for it.
    thread::sleep(ms(2000));
    assert_eq!(servers.each_ref().map(|(server, _)| server.activity()), at_rest);
}
