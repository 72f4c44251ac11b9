"""The page as a whole, and how it is put onto the application."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr
from fastapi import FastAPI
from gradio.themes import Base

from limner.studio.engine import Engine
from limner.studio.page.compare import Compare
from limner.studio.page.draw import Draw
from limner.studio.page.sessions import Sessions
from limner.studio.page.understand import Understand
from limner.studio.page.watch import Watch

STYLE = Path(__file__).with_name("page.css")
CACHE_S = 3600
"""How long files of the page are kept."""


def mount(app: FastAPI, engine: Engine) -> FastAPI:
    """The application with the page at its root."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    look = Base(primary_hue="indigo", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    theme = look.set(block_info_text_color="*neutral_600", block_info_text_color_dark="*neutral_300")
    return gr.mount_gradio_app(
        app, build(engine), path="/", theme=theme, css_paths=[STYLE], footer_links=[], ssr_mode=False, show_error=False,
        max_file_size=engine.limits.upload, mcp_server=False, pwa=False, enable_monitoring=False,
    )  # fmt: skip


def build(engine: Engine) -> gr.Blocks:
    """The page over an engine's models."""
    sessions = Sessions()
    names = list(engine.shelf.generators)
    panels = Panels(names)
    with gr.Blocks(title="Limner", analytics_enabled=False, delete_cache=(CACHE_S, CACHE_S), fill_width=True) as page:
        gr.Markdown("# Limner")
        choice = gr.Dropdown(names, value=names[0] if names else None, label="Model", visible=len(names) > 1)
        with gr.Tabs():
            if names:
                with gr.Tab("Draw"):
                    drawing = panels.each(lambda name: Draw(engine, sessions, name))
                with gr.Tab("Compare"):
                    panels.each(lambda name: Compare(engine, sessions, name, drawing[name].controls))
                with gr.Tab("Understand"):
                    panels.each(lambda name: Understand(engine, sessions, name, drawing[name].controls))
            if engine.shelf.runs:
                with gr.Tab("Watch"):
                    Watch(engine.shelf.runs)
        if len(names) > 1:
            panels.follow(choice)
        page.unload(sessions.stop)
    return page


class Panels:
    """The parts of the page that there are for each model, of which the chosen one's are seen."""

    def __init__(self, names: list[str]) -> None:
        self.names = names
        self.groups: list[tuple[str, Any]] = []

    def each(self, make: Callable[[str], Any]) -> dict[str, Any]:
        """Such a part for every model, by name."""
        made = {}
        for number, name in enumerate(self.names):
            with gr.Column(visible=number == 0, elem_classes=f"limner-model-{number}") as group:
                made[name] = make(name)
            self.groups.append((name, group))
        return made

    def follow(self, choice: gr.Dropdown) -> None:
        """Show what belongs to the chosen model, once all parts are made."""
        groups = self.groups
        choice.change(lambda chosen: [gr.Column(visible=name == chosen) for name, _ in groups], choice,
                      [group for _, group in groups], queue=False, api_visibility="private",
                      show_progress="hidden")  # fmt: skip
