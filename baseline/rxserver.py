"""The experiment in today's Python: TCP lines become a debounced event stream, with RxPY on asyncio.

    pip install -r requirements.txt
    python3 rxserver.py --tcp-port 8888 --interval 60000
"""

import asyncio
import signal
import sys
from argparse import ArgumentParser, Namespace

import reactivex as rx
from reactivex import operators as ops
from reactivex.scheduler.eventloop import AsyncIOScheduler
from reactivex.subject import Subject


def parse_arguments() -> Namespace:
    parser = ArgumentParser(description="A TCP server whose lines become a debounced event stream.")
    parser.add_argument("--tcp-port", type=int, default=8888, metavar="PORT", help="port to listen on [%(default)s]")
    parser.add_argument("--interval", type=int, default=60000, metavar="MS", help="period of the clock; a tenth of it is the debounce [%(default)s]")
    parser.add_argument("--keep-open", action="store_true", help="serve every line until the client closes (for the benchmark)")
    return parser.parse_args()


async def serve(port: int, interval: float, keep_open: bool) -> None:
    """Serves on the port, with a clock of `interval` seconds, until a signal stops it."""
    loop = asyncio.get_running_loop()
    lines: Subject[str] = Subject()
    stop: Subject[None] = Subject()
    finished = asyncio.Event()

    async def converse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection: a line, or all of them, is received, echoed byte for byte, and observed."""
        host, client_port = writer.get_extra_info("peername")[:2]
        try:
            received = False
            while (keep_open or not received) and (line := await reader.readline()):
                received = True
                text = line.decode(errors="replace").strip()
                print(f"Received {text} from {host}:{client_port}")
                lines.on_next(text)
                print(f"Send: {text}")
                writer.write(line)
                await writer.drain()
            if received:
                print("Close the client socket")
        except (ConnectionError, ValueError) as error:  # it left, or its line is too long
            print(f"rxserver: {host}:{client_port}: {error}", file=sys.stderr)
        finally:
            writer.close()

    def shut_down() -> None:
        """Subject and clock complete, so that debounce gives out what it holds back."""
        server.close()
        stop.on_next(None)
        lines.on_completed()

    server = await asyncio.start_server(converse, "0.0.0.0", port)
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, shut_down)
    address, port = server.sockets[0].getsockname()
    print(f"Serving on {address}:{port}")

    clock = rx.timer(0, interval).pipe(ops.take_until(stop))
    lines.pipe(
        ops.map(str.strip),
        ops.merge(clock),
        ops.debounce(interval / 10),
    ).subscribe(
        on_next=lambda event: print(f"Observing {event}"),
        on_completed=finished.set,
        scheduler=AsyncIOScheduler(loop),
    )
    await finished.wait()


def main() -> None:
    arguments = parse_arguments()
    sys.stdout.reconfigure(line_buffering=True)  # a line at a time also into a pipe
    asyncio.run(serve(arguments.tcp_port, arguments.interval / 1000, arguments.keep_open))


if __name__ == "__main__":
    main()
