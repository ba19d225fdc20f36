{{/* The release's name for everything. */}}
{{- define "baton.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride -}}
{{- else -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- if contains $name .Release.Name -}}{{ .Release.Name }}{{- else -}}{{ .Release.Name }}-{{ $name }}{{- end -}}
{{- end -}}
{{- end -}}

{{/* Labels of an object. Call with (dict "root" $ "component" "gateway"), and with "over" for
     labels of the user's that go over commonLabels. */}}
{{- define "baton.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version }}
app.kubernetes.io/name: {{ .root.Chart.Name }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
{{ include "baton.selectorLabels" . }}
{{- with merge (dict) (default (dict) .over) (default (dict) .root.Values.commonLabels) }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* What pods are selected by. KubeRay gives its pods an app.kubernetes.io/name of its own. */}}
{{- define "baton.selectorLabels" -}}
app.kubernetes.io/instance: {{ .root.Release.Name | quote }}
app.kubernetes.io/component: {{ .component }}
app.kubernetes.io/part-of: baton
{{- end -}}

{{/* Labels of a pod: what selects it, the user's, never the chart's version (it would roll). */}}
{{- define "baton.podLabels" -}}
{{ include "baton.selectorLabels" . }}
{{- with merge (dict) (default (dict) .labels) (default (dict) .root.Values.commonLabels) }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "baton.rayClusterName" -}}
{{ include "baton.fullname" . }}
{{- end -}}

{{- define "baton.headService" -}}
{{ include "baton.rayClusterName" . }}-head-svc
{{- end -}}

{{/* (dict "root" $ "for" "worker"): the ServiceAccount's name. */}}
{{- define "baton.serviceAccountName" -}}
{{- if .root.Values.serviceAccount.create -}}
{{ include "baton.fullname" .root }}-{{ .for }}
{{- else -}}
{{- default "default" (index .root.Values.serviceAccount.names .for) -}}
{{- end -}}
{{- end -}}

{{/* (dict "root" $ "image" {repository, tag, suffix, digest} "what" "images.gateway") */}}
{{- define "baton.image" -}}
{{- $expected := printf "%s%s" .root.Chart.AppVersion (default "" .image.suffix) -}}
{{- $tag := default $expected .image.tag -}}
{{- if and (ne $tag $expected) (not .root.Values.images.allowVersionSkew) -}}
{{- fail (printf "%s.tag is %q, but this chart is made for %q: gateway, controller and workers have to be of one version; leave the tag empty (what follows the version, such as -cpu, is the suffix), or set images.allowVersionSkew=true if you know that they are" .what $tag $expected) -}}
{{- end -}}
{{- include "baton.reference" (dict "image" .image "tag" $tag "what" .what) -}}
{{- end -}}

{{/* An image by its name, as container runtimes read one:
     https://github.com/distribution/reference. (dict "image" … "tag" … "what" "images.gateway") */}}
{{- define "baton.reference" -}}
{{- $part := "[a-z0-9]+(([.]|_|__|-+)[a-z0-9]+)*" -}}
{{- $host := "[A-Za-z0-9-]+([.][A-Za-z0-9-]+)*(:[0-9]+)?" -}}
{{- if not (regexMatch (printf "^(%s/)?%s(/%s)*$" $host $part $part) .image.repository) -}}
{{- fail (printf "%s.repository is %q, which names no image: [REGISTRY[:PORT]/]NAME in lower-case letters, without a tag (that is %s.tag) and without a digest (%s.digest)" .what .image.repository .what .what) -}}
{{- end -}}
{{- if not (regexMatch "^[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}$" .tag) -}}
{{- fail (printf "%s: %q is no tag of an image (tag, or the version and the suffix): letters, digits and _ . -, at most 128" .what .tag) -}}
{{- end -}}
{{- .image.repository }}:{{ .tag }}{{ with .image.digest }}@{{ . }}{{ end -}}
{{- end -}}

{{- define "baton.gatewayImage" -}}
{{- include "baton.image" (dict "root" . "image" .Values.images.gateway "what" "images.gateway") -}}
{{- end -}}

{{- define "baton.workerImage" -}}
{{- include "baton.image" (dict "root" . "image" .Values.images.worker "what" "images.worker") -}}
{{- end -}}

{{- define "baton.controllerImage" -}}
{{- if .Values.images.controller.repository -}}
{{- include "baton.image" (dict "root" . "image" .Values.images.controller "what" "images.controller") -}}
{{- else -}}
{{- include "baton.workerImage" . -}}
{{- end -}}
{{- end -}}

{{- define "baton.redisImage" -}}
{{- include "baton.reference" (dict "image" .Values.images.redis "tag" .Values.images.redis.tag "what" "images.redis") -}}
{{- end -}}
