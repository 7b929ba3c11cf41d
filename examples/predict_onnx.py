"""Draw what an exported file sees, with ONNX Runtime, NumPy and Pillow: predict_onnx.py FILE.onnx IMAGE PICTURE.png"""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageDraw


def fit(image: Image.Image, info: dict) -> tuple[np.ndarray, float, float]:
    """Resize an image and pad it to the file's size: the input (1, 3, H, W), and by how much x and y grew."""
    width, height = scale = info['scale'] or image.size
    bound = info['sizes'][0] if info['sizes'] else None
    if info['keep_ratio'] or not info['scale']:
        factor = min(max(scale) / max(image.size), min(scale) / min(image.size))
        factor = min(factor, bound[1] / image.width, bound[0] / image.height) if bound else factor
        width, height = (max(1, round(side * factor)) for side in image.size)
    elif bound:
        height, width = bound
    pixels = np.empty((*(bound or (height, width)), 3), np.float32)
    pixels[:] = info['canvas_value'] if info['canvas'] else info['mean']
    pixels[:height, :width] = image.resize((width, height), Image.Resampling.BILINEAR)
    return pixels.transpose(2, 0, 1)[None], width / image.width, height / image.height


def draw_labels(image: Image.Image, outputs: dict, info: dict, x: float, y: float) -> Image.Image:
    """A segmentor's label map over the image."""
    labels = outputs['labels'][0] if 'labels' in outputs else outputs['logits'][0].argmax(0)
    labels = labels[: round(image.height * y), : round(image.width * x)]
    colors = Image.fromarray(np.array(info['palette'], np.uint8)[labels])
    return Image.blend(image, colors.resize(image.size, Image.Resampling.NEAREST), 0.5)


def draw_boxes(image: Image.Image, outputs: dict, info: dict, x: float, y: float) -> Image.Image:
    """A detector's boxes with names and scores, and masks if there are any, over the image."""
    draw = ImageDraw.Draw(image)
    for index in range(int(outputs['count'][0])):
        box, score, label = (outputs[name][0, index] for name in ('boxes', 'scores', 'labels'))
        left, top, right, bottom = (round(float(edge)) for edge in box / [x, y, x, y])
        color = tuple(info['palette'][label])
        if score >= info['score_threshold']:
            if 'masks' in outputs:  # each over its box
                mask = Image.fromarray(outputs['masks'][0, index]).resize((max(right - left, 1), max(bottom - top, 1)))
                opacity = np.uint8(np.array(mask) >= info['mask_threshold']) * 128
                image.paste(color, (left, top), Image.fromarray(opacity))
            draw.rectangle((left, top, right, bottom), outline=color, width=2)
            text = f'{info["classes"][label]} {score:.2f}'
            draw.text((left + 3, top + 2), text, 'white', stroke_width=1, stroke_fill=0)
    return image


file, photo, picture = sys.argv[1:]
session = onnxruntime.InferenceSession(file)
info = json.loads(session.get_modelmeta().custom_metadata_map['repvit_mm'])
image = Image.open(photo).convert('RGB')
images, x, y = fit(image, info)
outputs = dict(zip(info['outputs'], session.run(None, {'images': images}), strict=True))
(draw_boxes if info['task'] == 'detection' else draw_labels)(image, outputs, info, x, y).save(picture)
