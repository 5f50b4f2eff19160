"""The dashboard for Grafana.

    python -m deploy.dashboard

writes components/monitoring/dashboard.json, which is checked in; a test fails when it is not
current.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from grafana_foundation_sdk.builders import (
    bargauge,
    common,
    dashboard,
    heatmap,
    prometheus,
    stat,
    timeseries,
    xychart,
)
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import (
    BarGaugeDisplayMode,
    LegendDisplayMode,
    LegendPlacement,
    StackingMode,
    TooltipDisplayMode,
    VizOrientation,
)
from grafana_foundation_sdk.models.dashboard import (
    DashboardCursorSync,
    DataSourceRef,
    DataTransformerConfig,
    VariableRefresh,
    VariableSort,
)
from grafana_foundation_sdk.models.prometheus import PromQueryFormat
from grafana_foundation_sdk.models.xychart import ScatterShow, SeriesMapping

PATH = Path(__file__).parent / "components" / "monitoring" / "dashboard.json"
# Panels' place: Grafana's grid has 24 columns; a row of panels has this height.
_COLUMNS, _HEIGHT = 24, 8
_SOURCE = DataSourceRef(type_val="prometheus", uid="${source}")
# The replicas that were chosen above the panels.
_CHOSEN = 'job=~"$job",instance=~"$instance"'


def as_json() -> str:
    """Return the dashboard as Grafana reads it."""
    return json.dumps(_dashboard().build(), cls=JSONEncoder, indent=2, sort_keys=True) + "\n"


def queries() -> Iterator[tuple[str, str]]:
    """Yield the queries of all panels, each with the panel's title."""
    for panel in json.loads(as_json())["panels"]:
        for target in panel.get("targets", []):
            yield panel["title"], target["expr"]


def _dashboard() -> dashboard.Dashboard:
    board = (
        dashboard.Dashboard("Fathom")
        .uid("fathom")
        .description("What each depth costs in quality and gains in speed, and how the fleet is.")
        .tags(["fathom", "llm"])
        .readonly()
        .refresh("30s")
        .time("now-1h", "now")
        .timezone("browser")
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .with_variable(dashboard.DatasourceVariable("source").label("Source").type("prometheus"))
        .with_variable(_label_variable("job", "Job", "label_values(fathom_engine_up, job)"))
        .with_variable(
            _label_variable(
                "instance", "Replica", 'label_values(fathom_engine_up{job=~"$job"}, instance)'
            )
        )
    )
    for title, panels in (
        ("Depth", _depth_panels()),
        ("Requests", _request_panels()),
        ("Latency", _latency_panels()),
        ("Load", _load_panels()),
        ("Model", _model_panels()),
        ("Writing and choosing", _probe_panels()),
        ("Repair", _repair_panels()),
        ("Health", _health_panels()),
    ):
        board.with_row(dashboard.Row(title))
        for panel in panels:
            board.with_panel(
                panel.datasource(_SOURCE).height(_HEIGHT).span(_COLUMNS // len(panels))
            )
    return board


def _label_variable(name: str, label: str, query: str) -> dashboard.QueryVariable:
    return (
        dashboard.QueryVariable(name)
        .label(label)
        .datasource(_SOURCE)
        .query(query)
        .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(VariableSort.NUMERICAL_ASC)
        .multi(True)
        .include_all(True)
        .all_value(".*")
    )


def _depth_panels() -> list[Any]:
    return [
        _quality_against_throughput(),
        _series("Tokens per second by depth", "short")
        .description("Generated tokens of all replicas, by the layers that ran.")
        .stacking(common.StackingConfig().mode(StackingMode.NORMAL))
        .fill_opacity(40)
        .with_target(
            _query(
                f"sum by (depth) (rate(fathom_generation_tokens_total{{{_CHOSEN}}}"
                "[$__rate_interval]))",
                "{{depth}} layers",
            )
        ),
        _series("Mean depth", "short")
        .description("Layers that ran for a generated token.")
        .with_target(
            _query(
                f"sum(rate(fathom_generation_layers_total{{{_CHOSEN}}}[$__rate_interval])) / "
                f"sum(rate(fathom_generation_tokens_total{{{_CHOSEN}}}[$__rate_interval]))",
                "layers",
            )
        ),
        _series("Degraded share", "percentunit")
        .description("Of requests that ended, and of replicas at this moment.")
        .max(1)
        .with_target(
            _query(
                f'sum(rate(fathom_requests_served_total{{{_CHOSEN},reason="degraded"}}'
                "[$__rate_interval])) / "
                f"sum(rate(fathom_requests_served_total{{{_CHOSEN}}}[$__rate_interval]))",
                "requests",
            )
        )
        .with_target(_query(f"avg(fathom_policy_degraded{{{_CHOSEN}}})", "replicas")),
    ]


def _quality_against_throughput() -> xychart.Panel:
    """What an operator trades: a point for each depth in use."""
    agreement, speed = "Agreement with dense", "Tokens per second"
    return (
        xychart.Panel()
        .title("Quality against throughput")
        .description(
            "A point for each level: tokens per second at full load, as measured when the server "
            "started, and the share of next tokens that are the dense model's, on held-out text."
        )
        .series_mapping(SeriesMapping.MANUAL)
        .series(
            [
                xychart.ScatterSeriesConfig()
                .name("Levels")
                .x(speed)
                .y(agreement)
                .show(ScatterShow.POINTS)
                .point_size(common.ScaleDimensionConfig().fixed(9).min(4).max(20))
                .label_value(common.TextDimensionConfig().field("depth"))
            ]
        )
        .with_target(
            _query(f"max by (depth) (fathom_depth_agreement_ratio{{{_CHOSEN}}})", "")
            .format(PromQueryFormat.TABLE)
            .instant()
            .ref_id("A")
        )
        .with_target(
            _query(f"max by (depth) (fathom_depth_measured_tokens_per_second{{{_CHOSEN}}})", "")
            .format(PromQueryFormat.TABLE)
            .instant()
            .ref_id("B")
        )
        .transformations(
            [
                DataTransformerConfig("joinByField", options={"byField": "depth", "mode": "inner"}),
                DataTransformerConfig(
                    "organize",
                    options={
                        "excludeByName": {"Time 1": True, "Time 2": True},
                        "renameByName": {"Value #A": agreement, "Value #B": speed},
                    },
                ),
            ]
        )
    )


def _request_panels() -> list[Any]:
    return [
        _series("Calls by status", "reqps")
        .stacking(common.StackingConfig().mode(StackingMode.NORMAL))
        .fill_opacity(40)
        .with_target(
            _query(
                f"sum by (code) (rate(fathom_requests_total{{{_CHOSEN}}}[$__rate_interval]))",
                "{{code}}",
            )
        ),
        _series("Generations by depth", "reqps")
        .stacking(common.StackingConfig().mode(StackingMode.NORMAL))
        .fill_opacity(40)
        .with_target(
            _query(
                "sum by (depth) (rate(fathom_request_duration_seconds_count"
                f"{{{_CHOSEN}}}[$__rate_interval]))",
                "{{depth}} layers",
            )
        ),
        _series("Prompt tokens per second", "short")
        .description("Tokens of prompts that the engine has begun with.")
        .with_target(
            _query(
                f"sum(rate(fathom_prompt_tokens_total{{{_CHOSEN}}}[$__rate_interval]))",
                "prompt tokens",
            )
        ),
    ]


def _latency_panels() -> list[Any]:
    panels: list[Any] = [
        heatmap.Panel()
        .title(title)
        .unit("s")
        .hide_legend()
        .rows_frame(heatmap.RowsHeatmapOptions().value("calls"))
        .y_axis(heatmap.YAxisConfig().unit("s"))
        .with_target(
            _query(
                f"sum by (le) (increase({histogram}_bucket{{{_CHOSEN}}}[$__rate_interval]))",
                "{{le}}",
            ).format(PromQueryFormat.HEATMAP)
        )
        for title, histogram in (
            ("Time to first token", "fathom_time_to_first_token_seconds"),
            ("Time between tokens", "fathom_inter_token_latency_seconds"),
        )
    ]
    quantiles = _series("Time between tokens, 99 of 100, by depth", "s").with_target(
        _query(
            "histogram_quantile(0.99, sum by (depth, le) (rate("
            f"fathom_inter_token_latency_seconds_bucket{{{_CHOSEN}}}[$__rate_interval])))",
            "{{depth}} layers",
        )
    )
    return [*panels, quantiles]


def _load_panels() -> list[Any]:
    return [
        _series("Requests in the server", "short")
        .description("The queue is the server's, so vLLM's own gauge of waiting requests is low.")
        .with_target(_query(f"sum(fathom_requests_waiting{{{_CHOSEN}}})", "waiting"))
        .with_target(_query(f"sum(fathom_requests_running{{{_CHOSEN}}})", "running")),
        _series("Time in the queue, 95 of 100", "s").with_target(
            _query(
                "histogram_quantile(0.95, sum by (le) (rate("
                f"fathom_request_queue_seconds_bucket{{{_CHOSEN}}}[$__rate_interval])))",
                "95 of 100 begin within",
            )
        ),
        _series("KV cache in use", "percentunit")
        .max(1)
        .with_target(_query(f"vllm:kv_cache_usage_perc{{{_CHOSEN}}}", "{{instance}}")),
    ]


def _model_panels() -> list[Any]:
    return [
        _bars("Block influence by layer", "short")
        .description("1 less the mean cosine of the residual stream before and after the layer.")
        .with_target(
            _query(
                f"max by (layer) (fathom_layer_block_influence{{{_CHOSEN}}})", "{{layer}}"
            ).instant()
        ),
        _bars("Agreement with dense by depth", "percentunit")
        .max(1)
        .with_target(
            _query(
                f"max by (depth) (fathom_depth_agreement_ratio{{{_CHOSEN}}})", "{{depth}}"
            ).instant()
        ),
        _bars("Perplexity by depth", "short").with_target(
            _query(f"max by (depth) (fathom_depth_perplexity{{{_CHOSEN}}})", "{{depth}}").instant()
        ),
    ]


def _probe_panels() -> list[Any]:
    """What perplexity and agreement hide; empty where the held-out text is too little."""
    return [
        _bars("Perplexity of what levels write", "short")
        .description(
            "Under the dense model, divided by that of what the dense model writes itself: 1 is as "
            "good as dense. fathom model shows the standard error."
        )
        .with_target(
            _query(
                f"max by (level) (fathom_level_writing_perplexity_ratio{{{_CHOSEN}}})", "{{level}}"
            ).instant()
        ),
        _bars("Repetition in what levels write", "percentunit")
        .max(1)
        .description(
            "Share of sequences of 4 tokens that were there before. Text in a loop has a low "
            "perplexity, and much of this. Compare with dense."
        )
        .with_target(
            _query(
                f"max by (level) (fathom_level_writing_repeated_ratio{{{_CHOSEN}}})", "{{level}}"
            ).instant()
        ),
        _bars("First tokens that are not the dense model's", "percentunit")
        .max(1)
        .description("Share of prompts that the level begins to continue in another way.")
        .with_target(
            _query(
                f"max by (level) (fathom_level_writing_first_token_changed_ratio{{{_CHOSEN}}})",
                "{{level}}",
            ).instant()
        ),
        _bars("Choosing among four answers", "percentunit")
        .max(1)
        .description(
            "Share of passages whose true continuation is the most likely one (guessing: 25 %), "
            "and share for which the level chooses what the dense model does."
        )
        .with_target(
            _query(
                f"min by (level) (fathom_level_choosing_accuracy_ratio{{{_CHOSEN}}})",
                "{{level}}, right",
            ).instant()
        )
        .with_target(
            _query(
                f"min by (level) (fathom_level_choosing_agreement_ratio{{{_CHOSEN}}})",
                "{{level}}, as dense",
            ).instant()
        ),
    ]


def _repair_panels() -> list[Any]:
    """Empty where the settings ask for no repair."""
    return [
        _stat("Replicas with repair", "percentunit")
        .description("Share of those that are to have it; the log and GetStatus say why not all.")
        .with_target(_query(f"avg(fathom_repair_up{{{_CHOSEN}}})", "with repair").instant()),
        _bars("KL divergence of the levels", "short")
        .description("Mean over the levels, in nats, with the maps and without, as last compared.")
        .with_target(
            _query(
                f"max by (repair) (fathom_repair_kl_nats{{{_CHOSEN}}})", "{{repair}} repair"
            ).instant()
        ),
        _bars("What repair leaves unexplained, by layer", "percentunit")
        .max(1)
        .description("Share of what the layer adds that its map does not.")
        .with_target(
            _query(
                f"max by (layer) (fathom_repair_unexplained_share{{{_CHOSEN}}})", "{{layer}}"
            ).instant()
        ),
        _stat("Memory of the maps", "bytes").with_target(
            _query(f"max(fathom_repair_bytes{{{_CHOSEN}}})", "of each replica").instant()
        ),
    ]


def _health_panels() -> list[Any]:
    return [
        _stat("Engines up", "short").with_target(
            _query(f"sum(fathom_engine_up{{{_CHOSEN}}})", "up").instant()
        ),
        _stat("Restarts of engines", "short")
        .description("Since each server was started.")
        .with_target(
            _query(f"sum(fathom_engine_restarts_total{{{_CHOSEN}}})", "restarts").instant()
        ),
        _stat("Changes of depth under load", "short").with_target(
            _query(
                f"sum by (direction) (increase(fathom_policy_changes_total{{{_CHOSEN}}}[1h]))",
                "{{direction}}",
            ).instant()
        ),
        _stat("Results that are not finite", "short")
        .description("Requests of the last hour that ended because of them, by depth.")
        .with_target(
            _query(
                f"sum by (depth) (increase(fathom_non_finite_results_total{{{_CHOSEN}}}[1h]))",
                "{{depth}} layers",
            ).instant()
        ),
        _bars("Start, by phase", "s").with_target(
            _query(f"max by (phase) (fathom_startup_seconds{{{_CHOSEN}}})", "{{phase}}").instant()
        ),
    ]


def _query(expression: str, legend: str) -> prometheus.Dataquery:
    return prometheus.Dataquery().expr(expression).legend_format(legend)


def _series(title: str, unit: str) -> timeseries.Panel:
    return (
        timeseries.Panel()
        .title(title)
        .unit(unit)
        .min(0)
        .fill_opacity(10)
        .legend(
            common.VizLegendOptions()
            .display_mode(LegendDisplayMode.LIST)
            .placement(LegendPlacement.BOTTOM)
            .show_legend(True)
        )
        .tooltip(common.VizTooltipOptions().mode(TooltipDisplayMode.MULTI))
    )


def _bars(title: str, unit: str) -> bargauge.Panel:
    return (
        bargauge.Panel()
        .title(title)
        .unit(unit)
        .min(0)
        .orientation(VizOrientation.HORIZONTAL)
        .display_mode(BarGaugeDisplayMode.BASIC)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
    )


def _stat(title: str, unit: str) -> stat.Panel:
    return (
        stat.Panel()
        .title(title)
        .unit(unit)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
    )


if __name__ == "__main__":
    PATH.write_text(as_json())
