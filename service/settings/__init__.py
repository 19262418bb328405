"""The configuration: one frozen, validated `Settings` from YAML files, `MODALKIT_…` variables and arguments."""

from modalkit.service.settings.layers import deep_merge
from modalkit.service.settings.models import (
    AppSettings,
    AsyncConfig,
    AuthConfig,
    BatchConfig,
    BuildConfig,
    CloudBucketMount,
    DeploymentConfig,
    Mount,
    QueueConfig,
    SqsConfig,
    WebhookConfig,
)
from modalkit.service.settings.problems import Problem, SettingsError
from modalkit.service.settings.settings import ModelEntry, ModelSettings, Settings

__all__ = [
    "AppSettings",
    "AsyncConfig",
    "AuthConfig",
    "BatchConfig",
    "BuildConfig",
    "CloudBucketMount",
    "DeploymentConfig",
    "ModelEntry",
    "ModelSettings",
    "Mount",
    "Problem",
    "QueueConfig",
    "Settings",
    "SettingsError",
    "SqsConfig",
    "WebhookConfig",
    "deep_merge",
]
