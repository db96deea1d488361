"""A headless Chromium, driven over its DevTools protocol through a pipe, with nothing but the standard library."""

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import time

import pytest

EXECUTABLE = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
#: Without a browser these tests are skipped, but never where CI runs them: there they fail.
needs_chromium = pytest.mark.skipif(
    EXECUTABLE is None and not os.environ.get('CI'), reason='needs Chromium; on Debian: apt-get install chromium'
)
_FLAGS = (
    '--headless',
    '--no-sandbox',
    '--disable-gpu',
    '--disable-quic',
    '--no-first-run',
    '--disable-background-networking',
    '--disable-component-update',
    '--disable-sync',
    '--disable-dev-shm-usage',
    '--remote-debugging-pipe',
)


class Browser:
    """One browser with one page, to be used in a ``with`` statement.

    Args:
        profile (Path): An empty folder for the browser's own files.
        seconds (float): How long to wait for an answer.
    """

    def __init__(self, profile, seconds=60):
        self.seconds = seconds
        self.problems = []
        assert EXECUTABLE, 'there is no Chromium; on Debian: apt-get install chromium'
        self._number = 0
        self._pending = b''
        self._events = []
        from_browser, its_output = os.pipe()
        its_input, to_browser = os.pipe()
        # The browser reads from descriptor 3 and writes to 4; none of ours may have these numbers.
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (its_input, its_output)]
        move = f'exec "$0" "$@" 3<&{ends[0]} 4>&{ends[1]}'
        self._process = subprocess.Popen(
            ['bash', '-c', move, EXECUTABLE, *_FLAGS, f'--user-data-dir={profile}', 'about:blank'],
            pass_fds=ends,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for end in (*ends, its_input, its_output):
            os.close(end)
        self._read, self._write = from_browser, to_browser
        self._session = None

    def __enter__(self):
        page = next(t for t in self.call('Target.getTargets')['targetInfos'] if t['type'] == 'page')
        attached = self.call('Target.attachToTarget', targetId=page['targetId'], flatten=True)
        self._session = attached['sessionId']
        for domain in ('Page', 'Runtime', 'Log', 'Network'):
            self.call(f'{domain}.enable')
        return self

    def __exit__(self, *_):
        os.close(self._write)
        os.close(self._read)
        self._process.terminate()
        self._process.wait(30)

    def open(self, path, width, height=900, mobile=False):
        """Open a file in a window of so many CSS pixels, and wait until it is there with all that it loads."""
        self.call('Emulation.setDeviceMetricsOverride', width=width, height=height, deviceScaleFactor=1, mobile=mobile)
        self.problems.clear()
        self._events.clear()
        self.call('Page.navigate', url=path.resolve().as_uri())
        self._wait(lambda: 'Page.loadEventFired' in self._events)

    def evaluate(self, expression):
        """Value of a JavaScript expression, or of the promise that it gives."""
        answer = self.call('Runtime.evaluate', expression=expression, returnByValue=True, awaitPromise=True)
        assert 'exceptionDetails' not in answer, answer['exceptionDetails']
        return answer['result'].get('value')

    def screenshot(self, path):
        """Save a picture of the whole page, not of the window alone."""
        answer = self.call('Page.captureScreenshot', captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(answer['data']))

    def print(self, path):
        """Print the page to a PDF file."""
        answer = self.call('Page.printToPDF', preferCSSPageSize=True)
        path.write_bytes(base64.b64decode(answer['data']))

    def call(self, method, **params):
        """Call a method of the protocol and wait for its result."""
        self._number += 1
        message = dict(id=self._number, method=method, params=params)
        if self._session is not None:
            message['sessionId'] = self._session
        os.write(self._write, json.dumps(message).encode() + b'\0')
        return self._wait(lambda: None, self._number)

    def _wait(self, done, number=None):
        """Take messages until the answer with a number is among them, or something is done."""
        end = time.monotonic() + self.seconds
        while number is not None or not done():
            answer = self._take(end)
            if number is not None and answer.get('id') == number:
                assert 'error' not in answer, answer['error']
                return answer['result']
        return None

    def _take(self, end):
        """The next message; what it says of the page is noted."""
        while b'\0' not in self._pending:
            left = end - time.monotonic()
            assert left > 0 and select.select([self._read], [], [], left)[0], 'the browser does not answer'
            part = os.read(self._read, 1 << 20)
            assert part, 'the browser has ended'
            self._pending += part
        raw, _, self._pending = self._pending.partition(b'\0')
        message = json.loads(raw)
        self._note(message.get('method'), message.get('params', {}))
        return message

    def _note(self, method, params):
        self._events.append(method)
        if method == 'Runtime.exceptionThrown':
            self.problems.append(params['exceptionDetails']['text'])
        elif method == 'Runtime.consoleAPICalled' and params['type'] in ('error', 'warning', 'assert'):
            self.problems.append(f'console.{params["type"]}: {params["args"]}')
        elif method == 'Log.entryAdded' and params['entry']['level'] in ('error', 'warning'):
            self.problems.append(params['entry']['text'])
        elif method == 'Network.requestWillBeSent' and not params['request']['url'].startswith(('data:', 'file:')):
            self.problems.append(f'loads {params["request"]["url"]}')
