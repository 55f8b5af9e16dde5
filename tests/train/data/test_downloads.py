"""Original files: downloaded once, whole and right, or found by hand."""

import hashlib
import http.server
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import tensorflow_datasets as tfds

from tests import conftest
from train import config as config_lib
from train import signals
from train.data import downloads

# Larger than one chunk, and different everywhere.
IMAGES = np.random.default_rng(0).bytes(300_000)
LABELS = b'\x07' * 5_000
BODIES = {'/a/images.gz': IMAGES, '/a/labels.gz': LABELS}


class Handler(http.server.BaseHTTPRequestHandler):
  """Serves `server.bodies`, well or as badly as `server.modes` say in turn."""

  def do_GET(self):  # noqa: N802 - the name that http.server calls
    modes = self.server.modes
    mode = modes.pop(0) if modes else self.server.mode
    body = self.server.bodies.get(self.path)
    asked = self.headers.get('Range')
    self.server.log.append((self.path, asked))
    if body is None or mode in (404, 416, 503):
      self.send_error(mode if isinstance(mode, int) else 404)
      return
    if mode == 'wrong':
      body = bytes(len(body))
    elif mode == 'longer':
      body += b'more'
    begin = int(asked[6:-1]) if asked and mode != 'no ranges' else 0
    self.send_response(206 if begin else 200)
    self.send_header('Content-Length', str(len(body) - begin))
    self.end_headers()
    body = body[begin:]
    if mode in ('break', 'stall'):
      body = body[: len(body) // 2]
    self.wfile.write(body)
    self.wfile.flush()
    if mode == 'stall':
      self.server.go_on.wait(10)

  def log_message(self, *_):
    """Tests read the log, nobody its lines."""


@pytest.fixture
def server(monkeypatch):
  monkeypatch.setenv('no_proxy', '127.0.0.1')
  server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
  server.bodies, server.log = dict(BODIES), []
  server.mode, server.modes = 'good', []
  server.go_on = threading.Event()
  # A client that goes away midway is what some tests are about.
  server.handle_error = lambda *_: None
  thread = threading.Thread(target=server.serve_forever, args=(0.01,))
  thread.start()
  yield server
  server.go_on.set()
  server.shutdown()
  thread.join()
  server.server_close()


@pytest.fixture
def table(server, monkeypatch):
  """'mnist' is the two files of BODIES at that server; returns their URLs."""
  host = f'http://127.0.0.1:{server.server_port}'
  files = tuple(
    downloads.File(host + path, len(body), hashlib.sha256(body).hexdigest())
    for path, body in BODIES.items()
  )
  monkeypatch.setitem(downloads.FILES, 'mnist', files)
  monkeypatch.setattr(downloads, '_DELAYS', (0, 0, 0))
  return [file.url for file in files]


@pytest.fixture
def folder(tmp_path, monkeypatch):
  """Where the downloads of mnist go."""
  monkeypatch.setenv('TAISHAN_CACHE', str(tmp_path / 'cache'))
  monkeypatch.delenv('TFDS_DATA_DIR', raising=False)
  return tmp_path / 'cache' / 'downloads' / 'mnist'


def fetch(data_dir=None, say=lambda line: None):
  return downloads.fetch('mnist', data_dir, say)


def check(found):
  """The two files, byte for byte."""
  assert {name: path.read_bytes() for name, path in found.items()} == {
    'images.gz': IMAGES,
    'labels.gz': LABELS,
  }


def refused(*words, data_dir=None):
  """The one line that says what is wrong; it holds these words."""
  with pytest.raises(config_lib.UserError) as caught:
    fetch(data_dir)
  line = str(caught.value)
  assert '\n' not in line
  for word in words:
    assert str(word) in line
  return line


def contents(folder):
  return {path.name: path.read_bytes() for path in folder.iterdir()}


def put(folder, name, body):
  folder.mkdir(parents=True, exist_ok=True)
  (folder / name).write_bytes(body)


def test_the_table_is_that_of_tfds():
  package = pathlib.Path(tfds.__file__).parent
  listed = package / 'datasets' / 'tiny_shakespeare' / 'checksums.tsv'
  text = listed.read_text()
  for name in ('mnist', 'fashion_mnist', 'cifar10', 'cifar100'):
    text += (package / 'url_checksums' / f'{name}.txt').read_text()
  lines = {tuple(line.split('\t')[:3]) for line in text.splitlines()}
  for files in downloads.FILES.values():
    for file in files:
      assert (file.url, str(file.size), file.sha256) in lines


# ---------------------------------------------------------------------- good


def test_all_files_arrive_and_what_comes_is_said_before(folder, table, server):
  lines = []
  check(fetch(say=lines.append))
  assert lines == [
    f'downloading mnist: 2 files, 0.3 MB from 127.0.0.1:{server.server_port} '
    f'into {folder}'
  ]
  assert contents(folder) == {'images.gz': IMAGES, 'labels.gz': LABELS}
  assert folder.stat().st_mode & 0o077 == 0


def test_what_is_there_is_not_downloaded_again(folder, table, server):
  fetch()
  server.log.clear()
  lines = []
  check(fetch(say=lines.append))
  assert not server.log
  assert not lines


def test_a_long_download_says_how_far_it_is(folder, table, monkeypatch):
  monkeypatch.setattr(downloads, '_REPORT_SECONDS', 0)
  lines = []
  fetch(say=lines.append)
  assert 'downloading images.gz: 0.3 of 0.3 MB' in lines


@pytest.mark.parametrize('place', ['', 'mnist'])
@pytest.mark.parametrize('variable', [True, False])
def test_files_put_there_by_hand_need_no_network(
  folder, table, server, tmp_path, monkeypatch, place, variable
):
  for path, body in BODIES.items():
    put(tmp_path / 'mine' / place, pathlib.Path(path).name, body)
  if variable:
    monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path / 'mine'))
  check(fetch(None if variable else str(tmp_path / 'mine')))
  assert not server.log
  assert not folder.exists()  # They are used where they are.


def test_only_the_missing_files_are_downloaded(folder, table, server):
  put(folder, 'images.gz', IMAGES)
  lines = []
  check(fetch(say=lines.append))
  assert [path for path, _ in server.log] == ['/a/labels.gz']
  assert '1 file, 0.0 MB' in lines[0]


def test_another_datasets_files_of_the_same_name_are_passed_over(
  folder, table, tmp_path, monkeypatch
):
  other = b'fashion'
  digest = hashlib.sha256(other).hexdigest()
  monkeypatch.setitem(
    downloads.FILES,
    'fashion_mnist',
    (downloads.File('http://127.0.0.1:9/images.gz', len(other), digest),),
  )
  put(tmp_path / 'mine', 'images.gz', other)
  check(fetch(str(tmp_path / 'mine')))


# ------------------------------------------------------- resumed and retried


def test_a_connection_broken_off_midway_is_resumed(folder, table, server):
  server.modes = ['break', 'break']
  check(fetch())
  assert server.log == [
    ('/a/images.gz', None),
    ('/a/images.gz', 'bytes=150000-'),
    ('/a/images.gz', 'bytes=225000-'),
    ('/a/labels.gz', None),
  ]
  assert set(contents(folder)) == {'images.gz', 'labels.gz'}


def test_a_server_that_ignores_ranges_sends_it_all_again(folder, table, server):
  server.modes = ['break', 'no ranges']
  check(fetch())


def test_a_server_that_stalls_is_asked_again(
  folder, table, server, monkeypatch
):
  monkeypatch.setattr(downloads, '_TIMEOUT_SECONDS', 0.2)
  server.modes = ['stall']
  check(fetch())
  assert server.log[1] == ('/a/images.gz', 'bytes=150000-')


def test_a_server_that_is_busy_is_asked_again(folder, table, server):
  server.modes = [503, 503]
  lines = []
  check(fetch(say=lines.append))
  assert len(server.log) == 4
  assert [line for line in lines if '503' in line and 'again' in line] == (
    lines[1:]
  )
  assert len(lines) == 3


def test_a_part_that_the_server_refuses_to_go_on_from_is_dropped(
  folder, table, server
):
  put(folder, 'images.gz.partial', IMAGES[:1000])
  server.modes = [416]
  check(fetch())
  assert server.log[:2] == [
    ('/a/images.gz', 'bytes=1000-'),
    ('/a/images.gz', None),
  ]


@pytest.mark.parametrize('part', [b'other', bytes(300_000), bytes(300_001)])
def test_a_part_of_another_file_is_dropped(folder, table, part):
  put(folder, 'images.gz.partial', part)
  lines = []
  check(fetch(say=lines.append))
  assert 'starting again' in lines[-1]
  assert set(contents(folder)) == {'images.gz', 'labels.gz'}


def test_a_whole_part_only_needs_its_name(folder, table, server):
  put(folder, 'images.gz.partial', IMAGES)
  check(fetch())
  assert [path for path, _ in server.log] == ['/a/labels.gz']


def test_a_signal_keeps_what_has_arrived(folder, table, server, monkeypatch):
  monkeypatch.setattr(signals, '_received', signal.SIGTERM)
  with pytest.raises(signals.Stopped):
    fetch()
  (part,) = contents(folder).items()
  assert part[0] == 'images.gz.partial'
  assert 0 < len(part[1]) < len(IMAGES)
  monkeypatch.setattr(signals, '_received', None)
  check(fetch())
  assert server.log[1] == ('/a/images.gz', f'bytes={len(part[1])}-')


# -------------------------------------------------------------- many processes

PROCESS = (
  'import sys\n'
  'from train.data import downloads\n'
  'files = [a.split(",") for a in sys.argv[1:]]\n'
  'downloads.FILES["mnist"] = tuple('
  'downloads.File(u, int(n), d) for u, n, d in files)\n'
  'print("ready", flush=True)\n'
  'lines = []\n'
  'print(*downloads.fetch("mnist", None, lines.append), *lines)\n'
)


def start():
  """A process that fetches mnist."""
  files = [f'{f.url},{f.size},{f.sha256}' for f in downloads.FILES['mnist']]
  child = subprocess.Popen(
    [sys.executable, '-c', PROCESS, *files],
    env=conftest.environment(),
    cwd=conftest.REPOSITORY,
    stdout=subprocess.PIPE,
    text=True,
  )
  assert child.stdout.readline() == 'ready\n'
  return child


def wait_until(condition):
  end = time.monotonic() + 10
  while not condition():
    assert time.monotonic() < end
    time.sleep(0.01)


def test_a_killed_download_goes_on_where_it_was(folder, table, server):
  server.modes = ['stall']
  child = start()
  partial = folder / 'images.gz.partial'
  try:
    # What it has written, less what its buffer held when it was killed.
    wait_until(lambda: partial.exists() and partial.stat().st_size > 0)
  finally:
    child.kill()
    child.wait()
    child.stdout.close()
  there = partial.stat().st_size
  assert 0 < there <= 150_000
  check(fetch())
  assert server.log[1] == ('/a/images.gz', f'bytes={there}-')


def test_two_processes_at_once_download_each_file_once(folder, table, server):
  server.modes = ['stall']
  first = start()
  children = [first]
  try:
    wait_until(lambda: server.log)
    children.append(start())
    time.sleep(0.2)  # The second one waits for the first.
    assert len(server.log) == 1
    server.go_on.set()
    said = [child.communicate(timeout=20)[0] for child in children]
  finally:
    for child in children:
      child.kill()
  assert [child.returncode for child in children] == [0, 0]
  assert 'downloading mnist' in said[0]
  assert said[1] == 'images.gz labels.gz\n'  # It found them.
  assert [asked for _, asked in server.log] == [None, 'bytes=150000-', None]


def test_waiting_for_another_process_ends_with_a_signal(
  folder, table, monkeypatch
):
  monkeypatch.setattr(signals, '_received', signal.SIGINT)
  with (
    downloads.hold(folder, 'mnist', print),
    pytest.raises(signals.Stopped),
  ):
    fetch()


# ------------------------------------------------------------------ mistakes


def test_wrong_bytes_are_removed_and_earlier_files_stay(folder, table, server):
  put(folder, 'images.gz', IMAGES)
  server.mode = 'wrong'
  refused(
    'labels.gz',
    table[1],
    hashlib.sha256(LABELS).hexdigest()[:12],
    hashlib.sha256(bytes(5000)).hexdigest()[:12],
    folder,
  )
  assert contents(folder) == {'images.gz': IMAGES}
  assert len(server.log) == 1  # The same bytes would come again.


@pytest.mark.parametrize('part', [b'', IMAGES[:1000]])
def test_a_file_of_another_size_is_not_downloaded(folder, table, server, part):
  put(folder, 'images.gz.partial', part)
  server.mode = 'longer'
  refused('300,004 bytes', '300,000', table[0])
  assert not contents(folder)


def test_a_file_that_is_not_there_any_more_is_said_with_what_to_do(
  folder, table, server
):
  server.mode = 404
  refused('config.data.name', 'mnist', '404', *table, '2 files, 0.3 MB', folder)
  assert not contents(folder)
  assert len(server.log) == 1


def test_a_server_that_always_breaks_off_is_given_up_and_its_part_kept(
  folder, table, server
):
  server.mode = 'break'
  refused('broke off', table[0], folder)
  assert len(server.log) == 4
  assert set(contents(folder)) == {'images.gz.partial'}
  server.mode = 'good'
  check(fetch())
  assert server.log[4][1].startswith('bytes=')


def test_no_network_is_said_with_what_to_do(folder, table, monkeypatch):
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    url = f'http://127.0.0.1:{free.getsockname()[1]}/images.gz'
  file = downloads.File(url, 11_600_000, '0' * 64)
  monkeypatch.setitem(downloads.FILES, 'mnist', (file,))
  refused('refused', url, '1 file, 11.6 MB', folder, 'config.data.data_dir')


@pytest.mark.parametrize('by_hand', [True, False])
def test_a_wrong_file_that_was_found_is_named_and_left_alone(
  folder, table, server, tmp_path, by_hand
):
  place = tmp_path / 'mine' / folder.name if by_hand else folder
  put(place, 'labels.gz', b'mine')
  refused(
    place / 'labels.gz',
    hashlib.sha256(b'mine').hexdigest()[:12],
    hashlib.sha256(LABELS).hexdigest()[:12],
    'remove it',
    data_dir=str(tmp_path / 'mine'),
  )
  assert contents(place) == {'labels.gz': b'mine'}
  assert not server.log


def test_a_folder_that_cannot_be_written_is_one_line(folder, table, server):
  folder.parent.parent.mkdir()
  folder.parent.write_text('a file, where a folder is needed')
  refused('downloads', 'TAISHAN_CACHE')
  assert not server.log


def test_a_file_that_cannot_be_read_is_one_line(folder, table):
  if os.name != 'posix' or os.getuid() == 0:
    pytest.skip('this user may read every file')
  put(folder, 'images.gz', IMAGES)
  (folder / 'images.gz').chmod(0)
  refused('images.gz', 'Permission')
