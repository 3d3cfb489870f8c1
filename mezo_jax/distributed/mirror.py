"""Entries of replicas over sockets: each comes to have those of all.

Replica 0 listens, the others connect to it, and each end sends what the other
says that it has not. A frame is

  ======  ==========================================
  uint8   kind: hello, have, entry
  uint32  the replica whose entry it is
  uint32  the entry's number
  uint16  bytes of what follows
  bytes   a JSON object; counts of entries; an entry
  uint32  CRC-32 of all before
  ======  ==========================================

in little-endian order. Every `RETRY` seconds an end says again what it has, so
that a frame that was lost is sent again; a connection that broke is made anew.
Whoever reaches the port can take part: use a network that you trust, or a
tunnel.
"""

import contextlib
import json
from pathlib import Path
import socket
import struct
import threading
import time
import zlib

from mezo_jax.core.errors import Again, first_line, InputError
from mezo_jax.distributed import hosts
from mezo_jax.distributed.exchange import Entries, Exchange, open_entries

RETRY = 1.0  # seconds
UNKNOWN = 10.0  # seconds to wait for a name that no resolver knows
_HEAD = struct.Struct('<BIIH')
_HELLO, _HAVE, _ENTRY = range(3)


class _Broken(Exception):
  """A connection that ended, or sent something else than frames."""


def frame(kind: int, payload: bytes, replica: int = 0, index: int = 0) -> bytes:
  data = _HEAD.pack(kind, replica, index, len(payload)) + payload
  return data + struct.pack('<I', zlib.crc32(data))


def read_frame(sock: socket.socket) -> bytes:
  """The bytes of a frame."""
  head = _exactly(sock, _HEAD.size)
  return head + _exactly(sock, _HEAD.unpack(head)[3] + 4)


def _exactly(sock: socket.socket, n: int) -> bytes:
  data = b''
  while len(data) < n:
    more = sock.recv(n - len(data))
    if not more:
      raise _Broken('it was closed')
    data += more
  return data


class Mirror:
  """What is behind an `Exchange`: threads that send and receive.

  Attributes:
    changed: notified when an entry has come or is to be sent; entries are
      touched by whoever holds it.
  """

  def __init__(self, entries: list[Entries], run: str, replica: int,
               address: tuple[str, int], retry: float = RETRY):
    self.changed = threading.Condition()
    self._all, self._replica, self._retry = entries, replica, retry
    self._hello = dict(run=run, replica=replica, replicas=len(entries))
    self._links, self._heard, self._error = {}, set(), None
    self._last, self._ends = 'nobody has been reached', threading.Event()
    self._address, self._server = address, None
    target = self._connect
    if replica == 0:
      both = socket.has_dualstack_ipv6()
      try:
        self._server = socket.create_server(
            ('', address[1]), family=socket.AF_INET6 if both else
            socket.AF_INET, dualstack_ipv6=both)
      except OSError as e:
        raise InputError(f'--exchange: replica 0 cannot listen at port '
                         f'{address[1]} ({e}); choose another.') from e
      target = self._accept
    threading.Thread(target=target, daemon=True).start()

  # What the exchange asks for.

  def check(self) -> None:
    """Raises what a thread has found."""
    if self._error:
      raise self._error

  def why(self, replica: int) -> str:
    return f' ({self._last})' if replica not in self._heard else ''

  def begin(self, timeout: float) -> None:
    """Waits until the others were heard, and gave what they have: of this
    replica's own entries too, which its disk may have lost."""
    wanted = {*range(1, len(self._all))} if self._replica == 0 else {0}
    until = time.monotonic() + timeout
    def gave(replica):
      x = self._links.get(replica)
      return x and x.alive and x.have is not None and all(
          n <= len(e.data) for n, e in zip(x.have, self._all))
    with self.changed:
      while not all(map(gave, wanted)):
        self.check()
        if time.monotonic() > until:
          raise Again(
              '--exchange: replica(s) '
              f'{", ".join(str(i) for i in sorted(wanted) if not gave(i))} did '
              f'not answer within {timeout:g} s ({self._last}); start them, '
              'and this one again.')
        self.changed.wait(self._retry)

  def close(self, timeout: float) -> None:
    """Ends when the others have all, or are gone."""
    counts = [len(e.data) for e in self._all]
    until = time.monotonic() + timeout
    lacks = lambda x: x.alive and (x.have is None or any(
        a < b for a, b in zip(x.have, counts)))
    with self.changed:
      while any(map(lacks, self._links.values())) and (
          time.monotonic() < until and not self._error):
        self.changed.wait(self._retry)
    self._ends.set()
    if self._server:
      self._server.close()
    for x in [*self._links.values()]:
      x.close()

  # Threads.

  def _accept(self) -> None:
    with contextlib.suppress(OSError):
      while not self._ends.is_set():
        sock, _ = self._server.accept()
        threading.Thread(
            target=self._serve, args=(sock,), daemon=True).start()

  def _connect(self) -> None:
    began = time.monotonic()
    while not self._ends.is_set():
      try:
        sock = socket.create_connection(self._address, 10.0)
      except (OSError, UnicodeError) as e:
        host, port = self._address
        self._last = f'{host}:{port}: {first_line(e)}'
        unknown = isinstance(e, (socket.gaierror, UnicodeError))
        if unknown and time.monotonic() - began > UNKNOWN:
          self._error = InputError(
              f'--exchange: no host is known by the name {host!r} ({e}).')
          with self.changed:
            self.changed.notify_all()
          return
      else:
        self._serve(sock)
        began = time.monotonic()
      self._ends.wait(self._retry)

  def _serve(self, sock: socket.socket) -> None:
    """Of one connection, until it ends."""
    link = None
    try:
      sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
      sock.settimeout(30 * self._retry + 30)
      sock.sendall(frame(_HELLO, json.dumps(self._hello).encode()))
      link = _Link(sock, self._greeted(*_read(sock)))
      with self.changed:
        self._links[link.replica] = link
        self._heard.add(link.replica)
        self.changed.notify_all()
      threading.Thread(target=self._send, args=(link,), daemon=True).start()
      while not self._ends.is_set():
        self._receive(link, *_read(sock))
    except (OSError, _Broken) as e:
      self._last = f'the connection broke: {first_line(e)}'
    except Exception as e:  # is raised where the run waits
      self._error = e
    finally:
      if link:
        link.close()
      sock.close()
      with self.changed:
        self.changed.notify_all()

  def _greeted(self, kind, replica, index, payload) -> int:
    del replica, index
    try:
      theirs = json.loads(payload)
    except ValueError:
      theirs = None
    if kind != _HELLO or not isinstance(theirs, dict):
      raise _Broken('no greeting')
    other = theirs.get('replica')
    same = {k: v for k, v in theirs.items() if k != 'replica'} == {
        k: v for k, v in self._hello.items() if k != 'replica'}
    if not same or other == self._replica or other not in range(
        len(self._all)):
      text = (f'replica {other} runs something else than this one, '
              f'{self._replica}, or has its number: give all the same config, '
              'weights, versions and --replicas, and each its own --replica.')
      if self._replica:
        raise InputError(text)
      raise _Broken(text)  # a stranger does not end the run
    return other

  def _receive(self, link: '_Link', kind, replica, index, payload) -> None:
    with self.changed:
      if kind == _HAVE:
        link.have = [*struct.unpack(f'<{len(self._all)}I', payload)]
        link.sent = [*link.have]
      elif kind == _ENTRY and replica < len(self._all):
        if self._all[replica].take(index, payload) == 'early':
          link.asks = True  # one before it was lost
      self.changed.notify_all()

  def _send(self, link: '_Link') -> None:
    """Sends what the other end has not, and now and then what this one has."""
    said = 0.0
    try:
      while link.alive:
        with self.changed:
          now, out = time.monotonic(), []
          if link.asks or now >= said + self._retry:
            counts = [len(e.data) for e in self._all]
            out.append(frame(_HAVE, struct.pack(f'<{len(counts)}I', *counts)))
            link.asks, said = False, now
          for e in self._all if link.sent else ():
            for i in range(link.sent[e.replica], len(e.data)):
              out.append(frame(_ENTRY, e.data[i], e.replica, i))
            link.sent[e.replica] = max(
                link.sent[e.replica], len(e.data))
          if not out:
            self.changed.wait(max(said + self._retry - now, 0.001))
        for data in out:
          link.sock.sendall(data)
    except OSError:
      link.close()


class _Link:
  """A connection to another replica."""

  def __init__(self, sock: socket.socket, replica: int):
    self.sock, self.replica, self.alive = sock, replica, True
    self.have = self.sent = None  # counts of entries, by replica
    self.asks = True

  def close(self) -> None:
    self.alive = False
    with contextlib.suppress(OSError):
      self.sock.shutdown(socket.SHUT_RDWR)


def _read(sock: socket.socket) -> tuple[int, int, int, bytes]:
  data = read_frame(sock)
  if zlib.crc32(data[:-4]) != struct.unpack('<I', data[-4:])[0]:
    raise _Broken('a frame was damaged')
  kind, replica, index, _ = _HEAD.unpack(data[:_HEAD.size])
  return kind, replica, index, data[_HEAD.size:-4]


def over_sockets(address: str, directory: Path, run: str, replica: int,
                 replicas: int, numbers: int, timeout: float = 1800.0,
                 retry: float = RETRY) -> Exchange:
  """An exchange over the network.

  Args:
    address: HOST:PORT of replica 0, which listens there.
    directory: of this replica's copies of all entries.
    run: what must be the same for all, as text.
    replica: the number of this one, from 0.
    replicas: how many there are.
    numbers: n, directions of a step.
    timeout: seconds after which a late replica ends this one.
    retry: seconds after which what may be lost is asked for again.

  Raises:
    Again: if the others do not answer in time.
    InputError: if they run something else, or for an address that is none.
  """
  host, port = hosts.address('--exchange', address)
  entries = open_entries(Path(directory), run, replica, replicas, numbers)
  for e in entries:
    e.write()  # copies grow here
  found = Mirror(entries, run, replica, (host, port), retry)
  found.begin(timeout)
  return Exchange(entries, replica, timeout, found)
