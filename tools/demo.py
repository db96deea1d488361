"""Train a small AdvMoE on handwritten digits, attack it, and show what came of it. No arguments, no GPU, no download.

Everything goes to work_dirs/demo: logs, config, checkpoints, the report and adversarial_examples.png. Interrupted, it
goes on where it was when it is started again; finished, it shows again what came of it. It trains three quarters as
long as the config says and attacks a third of the test images, so that it takes some minutes.
"""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from mmengine.config import Config
from tqdm import tqdm

from mmadvmoe.apis import load_robust_model
from mmadvmoe.attacks import Victim, build_attack
from mmadvmoe.evaluation import as_dataset, attack_examples, spread_images
from mmadvmoe.report import PARTS, slug
from mmadvmoe.runtime.launch import complete_loaders, load_config
from mmadvmoe.visualization import draw_image_grid, save_png

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / 'configs' / 'study' / 'advmoe-groups-branch_convnet_digits.py'
#: Where it works: the checkout, or beside an installation, which is not to be written to, the current folder.
HERE = ROOT if (ROOT / 'setup.py').is_file() else Path.cwd()
WORK_DIR = HERE / 'work_dirs' / 'demo'
NAME = 'AdvMoE'
REPORT = WORK_DIR / 'report'
METRICS = REPORT / slug(NAME) / PARTS['evaluation']
PICTURE = WORK_DIR / 'adversarial_examples.png'
#: What a trained model depends on.
TRAINING = ('model', 'train_dataloader', 'train_cfg', 'optim_wrapper', 'param_scheduler', 'custom_hooks', 'randomness')
#: Shorter than the config.
OPTIONS = {'train_cfg.max_epochs': 240}
#: What is left out of the attacks of the config, and how many test images are attacked, to end in a minute.
LEFT_OUT, TESTED = 'autoattack-held', 120
#: Images in the picture, and how many are attacked to choose them from.
SHOWN, TRIED = 8, 90


def typed(tool: str) -> str:
    """What to type for a tool."""
    return f'python tools/{tool}.py' if HERE == ROOT else f'python -m mmadvmoe.tools {Path(tool).name}'


def say(text: str) -> None:
    """Announce a step."""
    print(f'\n==> {text}', flush=True)


def start(tool: str, *arguments: object) -> subprocess.Popen:
    """Start one of the tools."""
    # Such small images keep few threads busy: with more, they wait for each other. Training is fastest with one.
    env = dict(os.environ)
    threads = 1 if tool == 'train.py' else min(2, os.cpu_count() or 1)
    env.setdefault('OMP_NUM_THREADS', str(threads))
    command = [sys.executable, ROOT / 'tools' / tool, *arguments]
    out = subprocess.PIPE if tool == 'train.py' else None
    return subprocess.Popen([str(part) for part in command], cwd=HERE, env=env, stdout=out, text=True)


def finish(process: subprocess.Popen) -> None:
    """Wait for a tool.

    Raises:
        SystemExit: It failed.
    """
    if process.wait():
        sys.exit(f'demo: {process.args[1]} failed; what it wrote last is above and in {WORK_DIR}')


def train(epochs: int) -> None:
    """Train or go on, with a bar for the epochs; shows validations and whatever is neither."""
    options = [f'{key}={value}' for key, value in OPTIONS.items()]
    process = start('train.py', CONFIG, '--work-dir', WORK_DIR, '--resume', '--cfg-options', *options)
    with tqdm(total=epochs, unit='epoch', desc='training') as bar:
        for line in process.stdout:
            if epoch := re.search(r'Epoch\(train\) +\[(\d+)\]', line):
                bar.update(int(epoch[1]) - bar.n)
            elif 'Router(train)' not in line:
                bar.write(line.rstrip())
    finish(process)


def set_aside_other_training(cfg: Config) -> None:
    """Move the work directory away if it was made with other settings, for nothing can go on from that."""
    saved = WORK_DIR / CONFIG.name
    if not saved.is_file():
        return
    before, now = load_config(saved), copy.deepcopy(cfg)
    # A run writes its config down complete.
    complete_loaders(now, ['train_dataloader'])
    if any(before.get(key) != now.get(key) for key in TRAINING):
        aside = WORK_DIR.with_name(f'demo_until_{time.strftime("%Y%m%d_%H%M%S")}')
        WORK_DIR.rename(aside)
        say(f'{CONFIG.name} has changed since the last demo: its results are in {aside} now')


def draw(cfg: Config, model: Victim) -> None:
    """Draw test images, what an attack makes of them, and the difference; half of them fooled if so many are."""
    dataset = as_dataset(cfg.test_dataloader.dataset)
    images, labels = spread_images(dataset, model.classifier.data_preprocessor, TRIED)
    attack = cfg.test_cfg.attacks.routepgd50
    examples = attack_examples(model, build_attack(attack, model), images, labels).telling(SHOWN)
    save_png(draw_image_grid(examples, attack_name=attack['type']), PICTURE)


def table(metrics: Mapping[str, float]) -> str:
    """The results as a table of text."""
    rows = [
        ('SA', 'no attack', 'clean'),
        ('RA', 'PGD-50, through the routers', 'pgd50'),
        ('RA', 'RoutePGD: routes held and forced', 'routepgd50'),
        ('RA', 'worst of both, image by image', 'ra'),
        ('RA-AA', 'the same and AutoAttack', 'worst'),
    ]
    lines = [f'{short:<6} {what:<36} {metrics[f"{name}/accuracy/top1"]:5.1f} %' for short, what, name in rows]
    prefix = 'clean/expert_share/'
    load = [
        f'expert {name.removeprefix(prefix)}: {100 * share:.1f} %'
        for name, share in metrics.items()
        if name.startswith(prefix)
    ]
    rule = '-' * max(map(len, lines))
    return '\n'.join([rule, *lines, rule, f'Expert load, no attack:  {",  ".join(load)}'])


def main() -> None:
    started = time.monotonic()
    cfg = load_config(CONFIG)
    cfg.merge_from_dict(OPTIONS)
    set_aside_other_training(cfg)
    folder = WORK_DIR.relative_to(HERE)
    epochs = cfg.train_cfg.max_epochs
    last = WORK_DIR / f'epoch_{epochs}.pth'
    if last.is_file():
        say(f'{folder} holds a trained model. Remove {folder} to train afresh')
    else:
        say(
            f'training in turns, experts and router, {epochs} epochs of adversarial batches (3 minutes on 2 quiet '
            f'cores);\n    every {cfg.train_cfg.val_interval} epochs it is attacked on held-out training images, to '
            'keep the most robust checkpoint'
        )
        train(epochs)
    best = max(WORK_DIR.glob('best_worst_accuracy_top1_*.pth'), key=os.path.getmtime)
    say(
        f'testing {best.name} on {TESTED} test images with PGD-50, RoutePGD and, on the survivors, AutoAttack: '
        'thousands of forward passes, a minute'
    )
    cfg.test_cfg.attacks.pop(LEFT_OUT)
    cfg.test_cfg.survivors_only.remove(LEFT_OUT)
    cfg.test_dataloader.dataset.indices = TESTED
    cfg.dump(WORK_DIR / 'demo.py')
    model = ['--model', NAME, WORK_DIR / 'demo.py', best]
    finish(start('analysis_tools/robustness_report.py', REPORT, *model, '--measure', 'evaluation', 'examples'))
    say('drawing adversarial examples')
    draw(cfg, Victim(load_robust_model(cfg, best)))
    say(f'done in {(time.monotonic() - started) / 60:.1f} minutes')
    print(table(json.loads(METRICS.read_text(encoding='utf-8'))))
    config, best = os.path.relpath(CONFIG, HERE), best.relative_to(HERE)
    print(
        f"""
The picture: {PICTURE.relative_to(HERE)}
The report:  {(REPORT / 'report.html').relative_to(HERE)}

Next:
  {typed('train')} {os.path.relpath(ROOT / 'configs', HERE)}/advmoe_resnet18_digits.py  # a ResNet-18
  {typed('test')} {config} {best} --attacks pgd50 autoattack --out work_dirs/demo/evaluation
  {typed('analysis_tools/robustness_report')} work_dirs/report --model {NAME} {config} {best}"""
    )


if __name__ == '__main__':
    main()
